"""What a run was upcycled from: kept in its checkpoints, compared when it resumes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError

MAY_CHANGE = frozenset(
    {
        "moe_aux_loss_coeff",
        "moe_expert_capacity_factor",
        "moe_pad_expert_input_to_capacity",
        "moe_router_load_balancing_type",
        "moe_token_dispatcher_type",
        "moe_z_loss_coeff",
    }
)
"""Fields of `UpcyclingConfig` that are chosen anew while a run trains."""


@dataclass(frozen=True)
class Origin:
    """The dense checkpoint of a run and what it became.

    Attributes:
        dense_checkpoint: Where the checkpoint was.
        fingerprint: What tells it from others; None where it could not be read.
        upcycling: The fields of `UpcyclingConfig`.
        kept: What the dense model's configs say and training does not change; see `mapping.kept`.
            None where nothing is known of it.
    """

    dense_checkpoint: str
    fingerprint: str | None
    upcycling: Mapping[str, Any]
    kept: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls,
        dense_checkpoint: str,
        fingerprint: str | None,
        config: UpcyclingConfig,
        kept: Mapping[str, Any] | None = None,
    ) -> "Origin":
        """Make it of the arguments of a run."""
        return cls(dense_checkpoint, fingerprint, asdict(config), kept=kept)

    def check(self, now: "Origin", run: str) -> None:
        """Check that a resume continues what was begun.

        Args:
            now: What the resuming command says.
            run: Where the run is, for the message.

        Raises:
            UpcyclingError: The dense checkpoint or the upcycling is another.
        """
        # A field that this version has added is in `now` alone.
        changed = [
            name
            for name in sorted(self.upcycling.keys() & now.upcycling.keys() - MAY_CHANGE)
            if self.upcycling[name] != now.upcycling[name]
        ]
        if changed:
            began = ", ".join(f"{name}={self.upcycling[name]}" for name in changed)
            given = ", ".join(f"{name}={now.upcycling[name]}" for name in changed)
            raise UpcyclingError(
                f"The run in {run} was upcycled with {began}; now {given} is given. "
                "A run goes on as it began: give the first values, or another name for a new run."
            )
        if now.fingerprint is not None and self.fingerprint not in (None, now.fingerprint):
            raise UpcyclingError(
                f"The run in {run} was upcycled from {self.dense_checkpoint}; the weights in "
                f"{now.dense_checkpoint} are others or were changed since. Give the original "
                "checkpoint, or another name for a new run."
            )

"""What a run began from, and its settings: kept in its checkpoints, compared when it resumes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
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


DENSE, RESTORED, RANDOM = "a dense checkpoint", "restored weights", "random weights"
"""What the weights of a run can begin as."""


@dataclass(frozen=True)
class Origin:
    """The weights that a run began from, what they became, and how they are trained.

    Attributes:
        dense_checkpoint: Where the checkpoint was, dense or restored; None where the weights were
            random.
        fingerprint: What tells it from others; None where it could not be read.
        upcycling: The fields of `UpcyclingConfig`; where no dense model was upcycled, the number
            of experts and top-k alone.
        kept: What the dense model's configs say and training does not change; see
            `checkpoint.kept`. None where nothing is known of it.
        weights: `DENSE`, `RESTORED` (NeMo's `resume.restore_config`) or `RANDOM`.
        settings: What decides the result beside them, by name; see `nemo.run_settings`. Empty
            where an older version has saved it.
    """

    dense_checkpoint: str | None
    fingerprint: str | None
    upcycling: Mapping[str, Any]
    kept: Mapping[str, Any] | None = None
    weights: str = DENSE
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        dense_checkpoint: str,
        fingerprint: str | None,
        config: UpcyclingConfig,
        kept: Mapping[str, Any] | None = None,
    ) -> "Origin":
        """Make it of the arguments of a run that has a dense checkpoint."""
        return cls(dense_checkpoint, fingerprint, asdict(config), kept)

    def __str__(self) -> str:
        experts, topk = self.upcycling["num_moe_experts"], self.upcycling["moe_router_topk"]
        model = "a dense model" if experts is None else f"an MoE of {experts} experts, top-{topk}"
        source = self.weights if self.dense_checkpoint is None else self.dense_checkpoint
        return f"{model} from {source}"

    def check(self, now: "Origin", run: str) -> None:
        """Check that a resume continues what was begun.

        Args:
            now: What the resuming command says.
            run: Where the run is, for the message.

        Raises:
            UpcyclingError: The weights are of another kind, the dense checkpoint or the upcycling
                is another.
        """
        if self._kind() != now._kind():
            raise UpcyclingError(
                f"The run in {run} is {self}; the command says {now}. A run goes on as it began: "
                "give what it began with, or another name for a new run."
            )
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
                f"The run in {run} began from {self.dense_checkpoint}; the weights in "
                f"{now.dense_checkpoint} are others or were changed since. Give the original "
                "checkpoint, or another name for a new run."
            )

    def _kind(self) -> tuple[str, bool]:
        return self.weights, self.upcycling["num_moe_experts"] is None

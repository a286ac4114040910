"""Origin and settings of a run: kept in the run's checkpoints, compared on a resume."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.engine.initializers import statistics_digests
from nemo_upcycle.errors import UpcyclingError

MAY_CHANGE = frozenset(
    {
        "moe_aux_loss_coeff",
        "moe_expert_capacity_factor",
        "moe_pad_expert_input_to_capacity",
        "moe_router_bias_update_rate",
        "moe_router_load_balancing_type",
        "moe_token_dispatcher_type",
        "moe_z_loss_coeff",
        "router_dense_gradient",
    }
)
"""Fields of `UpcyclingConfig` that may change during a run."""


def mapping_of(source: Any, world_size: int, ranks_per_node: int) -> dict[str, Any]:
    """Return the parallel mapping as plain data: `ParallelFolding`'s fields, and the ranks.

    Args:
        source: What has Megatron's fields: a config, or NeMo's strategy.
        world_size: Ranks of the job.
        ranks_per_node: Ranks of a node.
    """
    sizes = {f.name: getattr(source, f.name, f.default) for f in fields(ParallelFolding)}
    if sizes["expert_tensor_parallel_size"] is None:  # Megatron's default is TP
        sizes["expert_tensor_parallel_size"] = sizes["tensor_model_parallel_size"]
    return {**sizes, "world_size": world_size, "ranks_per_node": ranks_per_node}


DENSE, RESTORED, RANDOM = "a dense checkpoint", "restored weights", "random weights"
"""Kinds of initial weights of a run."""


@dataclass(frozen=True)
class Origin:
    """The initial weights of a run, the upcycling, and the training settings.

    Attributes:
        dense_checkpoint: Path of the dense or restored checkpoint; None for random weights.
        fingerprint: Fingerprint of the weights; None if they could not be read.
        upcycling: The fields of `UpcyclingConfig`; without a dense checkpoint only the number of
            experts and top-k.
        kept: Settings of the dense model's configs that training keeps; see `checkpoint.kept`.
            None if unknown.
        weights: `DENSE`, `RESTORED` (NeMo's `resume.restore_config`) or `RANDOM`.
        settings: Other settings that determine the result, by name; see `nemo.run_settings`.
            Megatron's front end knows `router_warmup_steps` alone. Empty if saved by an older
            version.
        step0: Whether the model computed the dense model's function at step 0, and why, as the
            run has reported; None if nothing was upcycled.
        mapping: The parallel mapping of the latest start; see `mapping_of`.
        statistics: Digests of the statistics that initializers read, by path; see
            `statistics_digests`.
    """

    dense_checkpoint: str | None
    fingerprint: str | None
    upcycling: Mapping[str, Any]
    kept: Mapping[str, Any] | None = None
    weights: str = DENSE
    settings: Mapping[str, Any] = field(default_factory=dict)
    step0: str | None = None
    mapping: Mapping[str, Any] | None = None
    statistics: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        dense_checkpoint: str,
        fingerprint: str | None,
        config: UpcyclingConfig,
        kept: Mapping[str, Any] | None = None,
    ) -> "Origin":
        """Return the origin of a run with a dense checkpoint."""
        digests = statistics_digests(config)
        return cls(dense_checkpoint, fingerprint, asdict(config), kept, statistics=digests)

    def __str__(self) -> str:
        experts, topk = self.upcycling["num_moe_experts"], self.upcycling["moe_router_topk"]
        model = "a dense model" if experts is None else f"an MoE of {experts} experts, top-{topk}"
        source = self.weights if self.dense_checkpoint is None else self.dense_checkpoint
        return f"{model} from {source}"

    def to_json(self) -> str:
        """Return the origin as it is recorded in a file."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def check(self, now: "Origin", run: str) -> None:
        """Check that a resume continues the same run.

        Args:
            now: The origin by the resuming command.
            run: The run's directory, for the message.

        Raises:
            UpcyclingError: The kind of weights, the dense checkpoint or the upcycling differs.
        """
        if self._kind() != now._kind():
            raise UpcyclingError(
                f"The run in {run} is {self}; the command says {now}. A run must continue as it "
                "began: give the original values, or another name for a new run."
            )
        # A field that is new in this version is only in `now`.
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
                "A run must continue as it began: give the original values, or another name for a "
                "new run."
            )
        if now.fingerprint is not None and self.fingerprint not in (None, now.fingerprint):
            raise UpcyclingError(
                f"The run in {run} began from {self.dense_checkpoint}; the weights in "
                f"{now.dense_checkpoint} are others or were changed since. Give the original "
                "checkpoint, or another name for a new run."
            )

        both = self.statistics.keys() & now.statistics.keys()
        if others := sorted(file for file in both if self.statistics[file] != now.statistics[file]):
            raise UpcyclingError(
                f"The run in {run} was upcycled with other statistics than those that are now in "
                f"{others[0]}. Restore the file or remove it, which a run that goes on does not "
                "need; or give another name for a new run."
            )

    def _kind(self) -> tuple[str, bool]:
        return self.weights, self.upcycling["num_moe_experts"] is None

"""Upcycling against its alternatives: tokens, GPU-hours and predicted loss of each."""

from dataclasses import dataclass, replace
from functools import cached_property

from nemo_upcycle.checkpoint.described import Dense
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.planner.hardware import Hardware
from nemo_upcycle.planner.search import Prediction, search
from nemo_upcycle.planner.tuning import tune
from nemo_upcycle.planner.workload import Workload
from nemo_upcycle.planner.worth import law
from nemo_upcycle.planner.worth.law import Interval, exactly
from nemo_upcycle.planner.worth.scope import outside

UPCYCLE, SAME_TOKENS, SAME_COST, SCRATCH = "upcycle", "dense_tokens", "dense_cost", "scratch"
"""The ways to spend GPU-hours: upcycling; the dense model trained on, with as many tokens or for as
many GPU-hours; the MoE from scratch, to the upcycled model's loss."""


@dataclass(frozen=True)
class Way:
    """One way, and what it takes from now on.

    Attributes:
        tokens: Tokens; None if only the law could say.
        gpu_hours: GPU-hours; None if only the law could say.
        loss: Predicted loss in nats per token; None outside of the law's range.
    """

    tokens: Interval | None
    gpu_hours: Interval | None
    loss: Interval | None


@dataclass(frozen=True)
class Worth:
    """The comparison.

    Attributes:
        moe: The best mapping of the MoE.
        dense: The best mapping of the dense model.
        parameters: N1, the dense model's parameters without embeddings and output layer.
        dense_tokens: D1, the tokens that the dense model has seen.
        tokens: D2, the tokens of upcycling.
        outside: What is outside of the law's range, in words; empty inside.
        extrapolated: Whether the law is used outside of its range.
    """

    moe: Prediction
    dense: Prediction
    parameters: int
    dense_tokens: float
    tokens: float
    outside: tuple[str, ...]
    extrapolated: bool

    @property
    def has_losses(self) -> bool:
        """Whether the law is used."""
        return self.extrapolated or not self.outside

    @property
    def most_tokens(self) -> float:
        """The most tokens that the law is asked about."""
        return law.FARTHEST_TOKENS if self.extrapolated else law.MOST_TOKENS

    @property
    def sunk_hours(self) -> float:
        """GPU-hours that the dense pre-training would take on these GPUs."""
        return self.dense_tokens * hours_per_token(self.dense)

    @property
    def dense_now(self) -> Interval | None:
        """Predicted loss of the dense model before upcycling."""
        return law.dense_loss(self.parameters, self.dense_tokens) if self.has_losses else None

    @cached_property
    def break_even(self) -> Interval | None:
        """See `law.break_even`; None if the law is not used."""
        if not self.has_losses:
            return None
        return law.break_even(self.parameters, self.dense_tokens, self.most_tokens)

    @cached_property
    def ways(self) -> dict[str, Way]:
        """All ways by name."""
        moe = hours_per_token(self.moe)
        spent, loss, scratch = self.tokens * moe, None, None
        if self.has_losses:
            loss = law.upcycled_loss(self.parameters, self.dense_tokens, self.tokens)
            scratch = law.scratch_tokens(self.parameters, self.dense_tokens, self.tokens)
        return {
            UPCYCLE: Way(exactly(self.tokens), exactly(spent), loss),
            SAME_TOKENS: self._dense(self.tokens),
            SAME_COST: self._dense(spent / hours_per_token(self.dense)),
            SCRATCH: Way(scratch, scratch and scratch.times(moe), loss),
        }

    def _dense(self, tokens: float) -> Way:
        every = self.dense_tokens + tokens
        is_known = self.has_losses and every <= self.most_tokens
        return Way(
            exactly(tokens),
            exactly(tokens * hours_per_token(self.dense)),
            law.dense_loss(self.parameters, every) if is_known else None,
        )

    @cached_property
    def advantages(self) -> dict[str, bool | None]:
        """Whether upcycling is the better choice, by the other way.

        Against `scratch` better means cheaper, against the dense model a lower loss. None where the
        printed digits of the law allow both; a way without a loss is left out.
        """
        found: dict[str, bool | None] = {}
        upcycled, scratch = self.ways[UPCYCLE].loss, self.ways[SCRATCH].tokens
        for name in (SAME_TOKENS, SAME_COST):
            dense = self.ways[name].loss
            if upcycled is not None and dense is not None:
                found[name] = _is_below(upcycled, dense)
        if scratch is not None:
            found[SCRATCH] = _is_below(exactly(self.tokens), scratch)
        return found


def _is_below(one: Interval, other: Interval) -> bool | None:
    if one.high < other.low:
        return True
    return False if one.low > other.high else None


def hours_per_token(prediction: Prediction) -> float:
    """Return the GPU-hours per token."""
    return prediction.mapping.world_size / prediction.tokens_per_second / 3600


def worth(
    workload: Workload,
    dense: Dense,
    gpus: int,
    hardware: Hardware,
    dense_tokens: float,
    tokens: float,
    extrapolate: bool = False,
) -> Worth:
    """Compare upcycling with its alternatives.

    Args:
        workload: The MoE and its batch; the dense model gets the same batch.
        dense: The dense model.
        gpus: Number of GPUs.
        hardware: The GPUs.
        dense_tokens: Tokens that the dense model has seen.
        tokens: Tokens of upcycling.
        extrapolate: Whether to use the law outside of its range.

    Raises:
        UpcyclingError: No mapping of one of the models fits.
    """
    control = replace(workload, upcycling=UpcyclingConfig(num_moe_experts=None))
    parameters = non_embedding(dense)
    refused = tuple(outside(workload.model, parameters, dense_tokens, tokens))
    return Worth(
        moe=_best(workload, gpus, hardware),
        dense=_best(control, gpus, hardware),
        parameters=parameters,
        dense_tokens=dense_tokens,
        tokens=tokens,
        outside=refused,
        extrapolated=extrapolate and bool(refused),
    )


def _best(workload: Workload, gpus: int, hardware: Hardware) -> Prediction:
    found = search(workload, gpus, hardware)
    # Where nothing fits, `tune` says what would.
    return found[0] if found else tune(workload, gpus, hardware).best[0]


def non_embedding(dense: Dense) -> int:
    """Return the dense model's parameters without embeddings and output layer."""
    arch = dense.arch
    matrices = 1 if arch.share_embeddings_and_output_weights else 2
    return dense.parameters - matrices * arch.vocab_size * arch.hidden_size


def parameters_of(workload: Workload) -> tuple[int, int]:
    """Return a model's parameters, and those that a token uses."""
    buffers = workload.buffers(ParallelFolding(), 0)
    total = sum(buffer.elements for buffer in buffers)
    routed = sum(buffer.elements for buffer in buffers if buffer.is_expert)
    return total, workload.upcycling.active_parameters(total, routed)

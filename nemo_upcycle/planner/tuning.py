"""Choose a mapping: the fastest mappings that fit, alternatives, and reasons."""

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_upcycle.config import PRECISIONS, OptimizerStorage
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.planner.hardware import Hardware
from nemo_upcycle.planner.impossible import even_batches, impossible
from nemo_upcycle.planner.memory import Memory, memory
from nemo_upcycle.planner.nodes import of_job
from nemo_upcycle.planner.remedies import remedies
from nemo_upcycle.planner.savings import SAVINGS, cost, on_hosts, with_savings
from nemo_upcycle.planner.search import (
    HEADROOM,
    Prediction,
    examined,
    least_of,
    room,
    unfolded,
)
from nemo_upcycle.planner.space import Allowed, everything, given_by, mappings_of
from nemo_upcycle.planner.step_time import fullest_rank, step_time
from nemo_upcycle.planner.workload import STAGES, Mapping, Workload


@dataclass(frozen=True)
class Tuning:
    """The result of the search.

    Attributes:
        best: The fastest mappings that fit, one per (TP, CP, PP, ETP, EP).
        fitting: Number of mappings that fit.
        tried: Number of mappings.
        compared: Alternatives by name: `recipe`, the recipe's own mapping; `unfolded`, the best
            without folding; `PP1`, the best without pipeline.
        faster: A faster mapping that needs up to 1.5 times the available memory; None if there is
            none.
        saving: How the optimizer is stored, if the planner had to save memory there, and what this
            costs; None otherwise.
        even_batches: Batches for which the layers alone divide over the stages, where no mapping
            does so for this batch.
    """

    best: tuple[Prediction, ...]
    fitting: int
    tried: int
    compared: dict[str, Prediction]
    faster: Prediction | None
    saving: str | None = None
    even_batches: tuple[int, ...] = ()


def tune(
    workload: Workload,
    world_size: int,
    hardware: Hardware,
    allowed: Allowed = everything,
    own: Prediction | None = None,
    savings: Sequence[OptimizerStorage] = (),
) -> Tuning:
    """Find the fastest mappings that fit, and alternatives to compare.

    Args:
        workload: Model and batch.
        world_size: Number of GPUs.
        hardware: The GPUs.
        allowed: Which mappings to consider.
        own: The prediction for the recipe's own mapping.
        savings: Ways to store the optimizer that are tried if nothing fits: see `SAVINGS`.

    Raises:
        UpcyclingError: No mapping fits; the message has the least memory that any mapping needs,
            and what would fit. Or no mapping is possible; the message says why, and what is.
    """
    whole, hardware = hardware, of_job(hardware, world_size)
    every = list(mappings_of(workload, world_size, hardware, allowed))
    if not every:
        raise impossible(workload, world_size, whole, allowed)
    found = examined(workload, hardware, on_hosts(workload, hardware, every))
    predictions, too_large, saving = found.fitting, found.too_large, None
    if not predictions:
        predictions = with_savings(workload, hardware, every, savings)
        if not predictions:
            raise _nothing_fits(workload, world_size, whole, allowed, every)
        would = remedies(workload, world_size, whole, allowed)
        saving = cost(predictions[0], workload, every, would)
        workload = predictions[0].workload
        too_large = [
            (one, used)
            for one, *_ in every
            if (used := memory(workload, one)).total > room(hardware)
        ]
    return Tuning(
        best=tuple(_distinct(predictions)),
        fitting=len(predictions),
        tried=len(every),
        compared=_compared(workload, world_size, hardware, predictions, own),
        faster=_faster(workload, hardware, too_large, predictions[0]),
        saving=saving,
        even_batches=_even_batches(workload, world_size, whole, allowed, every),
    )


def _even_batches(
    workload: Workload,
    world_size: int,
    hardware: Hardware,
    allowed: Allowed,
    every: Sequence[list[Mapping]],
) -> tuple[int, ...]:
    given = any(name in given_by(allowed).folding for name in STAGES)
    if given or not all(one.folding.accounted for one, *_ in every):
        return ()
    return tuple(even_batches(workload, world_size, hardware, allowed))


def _distinct(predictions: list[Prediction]) -> list[Prediction]:
    """Return the first mapping per (TP, CP, PP, ETP, EP); the others differ little."""
    first: dict[object, Prediction] = {}
    for prediction in predictions:
        sizes = vars(prediction.mapping.folding) | {"virtual_pipeline_model_parallel_size": None}
        first.setdefault(tuple(sizes.values()), prediction)
    return list(first.values())


def _compared(
    workload: Workload,
    world_size: int,
    hardware: Hardware,
    predictions: list[Prediction],
    own: Prediction | None,
) -> dict[str, Prediction]:
    compared = {"recipe": own} if own else {}
    wanted: dict[str, Allowed] = {
        "unfolded": unfolded,
        "PP1": lambda mapping: mapping.folding.pipeline_model_parallel_size == 1,
    }
    if not workload.is_moe:
        del wanted["unfolded"]
    for name, is_wanted in wanted.items():
        first = next((one for one in predictions if is_wanted(one.mapping)), None)
        if first is not None and first is not predictions[0]:
            compared[name] = first
    return compared


def _faster(
    workload: Workload,
    hardware: Hardware,
    too_large: list[tuple[Mapping, Memory]],
    best: Prediction,
) -> Prediction | None:
    """Return the fastest mapping that nearly fits, if faster than the best that fits."""
    fastest = None
    for mapping, used in too_large:
        if used.total / room(hardware) > 1.5:
            continue
        time = step_time(workload, mapping, hardware)
        if time.total < (fastest or best).time.total:
            fastest = Prediction(workload, mapping, hardware, used, time)
    return fastest


def _nothing_fits(
    workload: Workload,
    world_size: int,
    hardware: Hardware,
    allowed: Allowed,
    every: Sequence[list[Mapping]],
) -> UpcyclingError:
    used = of_job(hardware, world_size)
    least = least_of(workload, used, every)
    too_much = least.memory.total - room(hardware)
    would = remedies(workload, world_size, hardware, allowed)
    if PRECISIONS[workload.precision].has_savings:
        for one in with_savings(workload, used, every, SAVINGS)[:1]:
            chosen = one.workload.optimizer.chosen.items()
            arguments = ", ".join(f"{name}={value!r}" for name, value in chosen)
            would.insert(0, f"{arguments} on the same GPUs")
    return UpcyclingError(
        f"Nothing fits into {HEADROOM:.0%} of {hardware.memory_gib:g} GiB on {world_size} GPUs: "
        f"{least.mapping} needs the least memory, {least.memory.total / 2**30:.0f} GiB, which is "
        f"{too_much / 2**30:.1f} GiB too much. "
        + (f"This would fit: {'; or '.join(would)}." if would else "Use GPUs with more memory.")
    )


COMPONENTS = {
    "matrices": "matrix products",
    "attention": "attention",
    "memory_bound": "norms, activations, permutation",
    "host": "waiting for the host",
    "tensor_parallel": "tensor-parallel collectives",
    "expert_parallel": "sending tokens to experts",
    "context_parallel": "context parallelism",
    "pipeline": "pipeline bubble and uneven stages",
    "data_parallel": "gradients and parameters",
    "optimizer": "optimizer",
}
"""Parts of the step time, in words."""


def differences(one: Prediction, other: Prediction) -> list[tuple[str, float]]:
    """Return the largest differences: the part in words, and how many seconds `other` is slower."""
    pairs = zip(one.time._asdict().items(), other.time, strict=True)
    signed = [(COMPONENTS[name], more - value) for (name, value), more in pairs]
    return sorted(signed, key=lambda pair: -abs(pair[1]))


def explain(tuning: Tuning) -> list[str]:
    """Explain the first mapping in one sentence per alternative."""
    first, *others = tuning.best
    lines = [] if tuning.saving is None else [tuning.saving]
    lines += [
        f"{name} ({other.mapping.folding}) is {_explained(first, other)}"
        for name, other in {
            **({"2": others[0]} if others else {}),
            **tuning.compared,
        }.items()
        if other.mapping != first.mapping
    ]
    lines += _routing(first)
    if tuning.even_batches:
        batches = " or ".join(map(str, tuning.even_batches))
        lines.append(
            f"{first.workload.global_batch_size} sequences divide over {first.mapping.world_size} "
            "GPUs only where the output layer, or the embedding too, counts as a layer. "
            f"global_batch_size={batches} has more mappings."
        )
    if tuning.faster is not None:
        faster = tuning.faster
        lines.append(
            f"Faster by {1 - faster.time.total / first.time.total:.0%}, but too large: "
            f"{faster.mapping}, {faster.memory.total / 2**30:.0f} GiB."
        )
    return lines


def _routing(one: Prediction) -> list[str]:
    """Return what is assumed of the routing, where the mapping depends on it."""
    fullest = fullest_rank(one.workload, one.mapping, one.hardware) if one.workload.is_moe else 1
    if fullest == 1:
        return []
    ranks = one.mapping.folding.expert_model_parallel_size
    return [
        f"Assumed: the fullest of {ranks} expert-parallel ranks has {fullest - 1:.0%} more tokens "
        "than the mean. Spread evenly, a step takes "
        f"{1 - one.even_seconds / one.time.total:.1%} less."
    ]


def _explained(first: Prediction, other: Prediction) -> str:
    slower = other.time.total / first.time.total - 1
    parts = [
        f"{seconds:+.2f} s {words}"
        for words, seconds in differences(first, other)[:3]
        if abs(seconds) > 0.001 * first.time.total
    ]
    verdict = f"{abs(slower):.1%} {'slower' if slower >= 0 else 'faster'}"
    fits = "" if other.fits else f", and does not fit ({other.memory.total / 2**30:.0f} GiB)"
    return f"{verdict}{fits}" + (f": {', '.join(parts)}." if parts else ".")

"""Answer which mapping to train on: the fastest that fit, what they are compared with, and why."""

from dataclasses import dataclass

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.planner.hardware import Hardware
from nemo_upcycle.planner.memory import memory
from nemo_upcycle.planner.search import (
    HEADROOM,
    Allowed,
    Prediction,
    everything,
    fitting,
    least_memory,
    mappings_of,
    room,
    search,
    unfolded,
)
from nemo_upcycle.planner.step_time import step_time
from nemo_upcycle.planner.workload import Mapping, Workload


@dataclass(frozen=True)
class Tuning:
    """The answer.

    Attributes:
        best: The fastest, one for each TP, CP, PP, ETP and EP.
        fitting: How many mappings fit.
        tried: How many there are.
        compared: By name, what else one could do: `recipe`, its own mapping; `unfolded`, the best
            without folding; `PP1`, without pipeline; `FSDP`.
        faster: The fastest of those that need up to half as much again as there is, if it would
            win.
    """

    best: tuple[Prediction, ...]
    fitting: int
    tried: int
    compared: dict[str, Prediction]
    faster: Prediction | None


def tune(
    workload: Workload,
    world_size: int,
    hardware: Hardware,
    allowed: Allowed = everything,
    own: Prediction | None = None,
) -> Tuning:
    """Find the fastest mappings that fit, and what to compare them with.

    Args:
        workload: What is trained.
        world_size: GPUs.
        hardware: Their kind.
        allowed: Which mappings to look at.
        own: What the recipe does as it is.

    Raises:
        UpcyclingError: None fits; says how much memory the one that takes the least needs.
    """
    every = list(mappings_of(workload, world_size, hardware, allowed))
    predictions = fitting(workload, hardware, every)
    if not predictions:
        raise _nothing_fits(workload, world_size, hardware, allowed)
    return Tuning(
        best=tuple(_distinct(predictions)),
        fitting=len(predictions),
        tried=len(every),
        compared=_compared(workload, world_size, hardware, predictions, own),
        faster=_faster(workload, hardware, every, predictions[0]),
    )


def _distinct(predictions: list[Prediction]) -> list[Prediction]:
    """Return the first of each TP, CP, PP, ETP and EP: others differ in small change."""
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
    fsdp = search(workload, world_size, hardware, fsdp=True)
    return compared | ({"FSDP": fsdp[0]} if fsdp else {})


def _faster(
    workload: Workload, hardware: Hardware, every: list[list[Mapping]], best: Prediction
) -> Prediction | None:
    """Return the fastest of those that nearly fit, if it is faster than the best."""
    fastest = None
    for mapping, *_ in every:
        used = memory(workload, mapping)
        if not 1 < used.total / room(hardware) <= 1.5:
            continue
        time = step_time(workload, mapping, hardware)
        if time.total < (fastest or best).time.total:
            fastest = Prediction(workload, mapping, hardware, used, time)
    return fastest


def _nothing_fits(
    workload: Workload, world_size: int, hardware: Hardware, allowed: Allowed
) -> UpcyclingError:
    least = least_memory(workload, world_size, hardware, allowed)
    if least is None:
        return UpcyclingError(
            f"No mapping spreads the model and {workload.global_batch_size} sequences over "
            f"{world_size} GPUs under these settings; use a number of GPUs that divides by more, "
            "another global_batch_size, or fewer settings."
        )
    return UpcyclingError(
        f"Nothing fits into {HEADROOM:.0%} of {hardware.memory_gib:g} GiB on {world_size} GPUs: "
        f"{least.mapping} takes the least and needs {least.memory.total / 2**30:.0f} GiB. Use "
        "more GPUs, or GPUs with more memory."
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
"""What a step's time is spent on, in words."""


def differences(one: Prediction, other: Prediction) -> list[tuple[str, float]]:
    """Return in what two predictions differ most: words, and seconds that the other takes more."""
    pairs = zip(vars(one.time).items(), vars(other.time).values(), strict=True)
    signed = [(COMPONENTS[name], more - value) for (name, value), more in pairs]
    return sorted(signed, key=lambda pair: -abs(pair[1]))


def explain(tuning: Tuning) -> list[str]:
    """Say why the first is the first, a sentence for each that it is compared with."""
    first, *others = tuning.best
    lines = [
        f"{name} ({other.mapping.folding}) is {_explained(first, other)}"
        for name, other in {
            **({"2": others[0]} if others else {}),
            **{name: one for name, one in tuning.compared.items() if name != "FSDP"},
        }.items()
        if other.mapping != first.mapping
    ]
    if tuning.faster is not None:
        faster = tuning.faster
        lines.append(
            f"Faster by {1 - faster.time.total / first.time.total:.0%}, but it does not fit: "
            f"{faster.mapping}, {faster.memory.total / 2**30:.0f} GiB."
        )
    return lines


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

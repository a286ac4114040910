"""Why a number of GPUs has no mapping of a model and a batch, and which values would have one."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from math import gcd, lcm
from typing import Any

from nemo_upcycle.config import ACCOUNTED_LAYERS, ParallelFolding
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.planner.hardware import Hardware
from nemo_upcycle.planner.nodes import near, of_job
from nemo_upcycle.planner.search import any_fits
from nemo_upcycle.planner.space import (
    Allowed,
    Given,
    foldings,
    given_by,
    mappings_of,
    micro_batch_sizes,
)
from nemo_upcycle.planner.workload import OF_STAGES, STAGES, Mapping, Workload
from nemo_upcycle.plans.layout import validate

PP, VPP = ParallelFolding.NAMES["pp"], ParallelFolding.NAMES["vpp"]


def impossible(
    workload: Workload, world_size: int, hardware: Hardware, allowed: Allowed
) -> UpcyclingError:
    """Return the error that says which sizes contradict, and which values have a mapping.

    Args:
        workload: Model and batch, which have no mapping.
        world_size: Number of GPUs.
        hardware: The GPUs and their nodes.
        allowed: Which mappings were considered.
    """
    given, batch = given_by(allowed), workload.global_batch_size
    units = _units(workload, world_size, hardware, given)
    reason = _of_sizes(workload, world_size, given) or _of_batch(batch, units)
    said = []
    for begin, works in (
        ("Possible: ", any_fits),
        ("Possible with more memory per GPU: ", _exists),
    ):
        if ways := list(_ways(workload, world_size, hardware, allowed, units, works)):
            said.append(f"{begin}{'; or '.join(ways)}.")
        if any("global_batch_size" in way for way in ways) or (said and not units):
            break
    return UpcyclingError(
        f"No mapping of the model and {batch} sequences onto {world_size} GPUs is possible: "
        f"{reason} {' '.join(said) or 'Give fewer settings.'}"
    )


def even_batches(
    workload: Workload, world_size: int, hardware: Hardware, allowed: Allowed
) -> list[int]:
    """Return the nearest batches for which the layers alone can be divided over the stages.

    Args:
        workload: Model and batch.
        world_size: Number of GPUs.
        hardware: The GPUs and their nodes.
        allowed: Which mappings were considered, without uneven stages that are given.
    """
    given = given_by(allowed)
    even = replace(given, folding=given.folding | dict.fromkeys(ACCOUNTED_LAYERS, False))
    used = of_job(hardware, world_size)
    batches = _batches(
        workload.global_batch_size, world_size, _units(workload, world_size, hardware, even)
    )
    others = (replace(workload, global_batch_size=batch) for batch in batches)
    return [
        other.global_batch_size
        for other in others
        if any(mappings_of(other, world_size, used, even))
    ]


Works = Callable[[Workload, Hardware, Iterable[list[Mapping]]], bool]


def _exists(workload: Workload, hardware: Hardware, every: Iterable[list[Mapping]]) -> bool:
    return any(every)


def _ways(
    workload: Workload,
    world_size: int,
    hardware: Hardware,
    allowed: Allowed,
    units: set[int],
    works: Works,
) -> Iterator[str]:
    """Yield what has a mapping that works: other values, other batches, other numbers of GPUs."""
    given, used = given_by(allowed), of_job(hardware, world_size)
    for name in given.settings:
        groups: dict[Any, list[list[Mapping]]] = defaultdict(list)
        for mappings in mappings_of(workload, world_size, used, given.without(name)):
            one = mappings[0]
            groups[getattr(one if hasattr(one, name) else one.folding, name)].append(mappings)
        values = [value for value, every in groups.items() if works(workload, used, every)]
        if values:
            yield f"{name}={_or(sorted(values, key=lambda value: value or 0))}"
    batches = []
    for batch in _batches(workload.global_batch_size, world_size, units):
        other = replace(workload, global_batch_size=batch)
        if works(other, used, mappings_of(other, world_size, used, allowed)):
            batches.append(batch)
    if batches:
        yield f"global_batch_size={_or(batches)}"

    def of_gpus(gpus: int) -> bool:
        if gpus % given.gpus_multiple_of:
            return False
        on = of_job(hardware, gpus)
        return works(workload, on, mappings_of(workload, gpus, on, allowed))

    if numbers := near(world_size, hardware.gpus_per_node, of_gpus):
        yield f"{_or(numbers)} GPUs"


def _of_sizes(workload: Workload, world_size: int, given: Given) -> str | None:
    """Say which given sizes contradict the model, the GPUs or the sequence; None if none does."""
    fields = given.folding
    for name, value in fields.items():
        if name not in OF_STAGES and (error := _error(workload, None, {name: value})):
            return error
    if error := _of_stages(workload, world_size, fields):
        return error
    tp, cp = (fields.get(ParallelFolding.NAMES[name], 1) for name in ("tp", "cp"))
    if workload.seq_length % (2 * cp * tp):
        return (
            f"seq_length={workload.seq_length} does not divide by 2·CP·TP = {2 * cp * tp}, into "
            "which Megatron splits a sequence."
        )
    return None


def _of_stages(workload: Workload, world_size: int, fields: dict[str, Any]) -> str | None:
    """Say why the given sizes leave no number of pipeline stages; None if they leave one."""
    stages = [fields[PP]] if PP in fields else range(1, workload.arch.num_layers + 1)
    errors = []
    for pp in stages:
        if PP in fields or world_size % pp == 0:
            error = _error(workload, world_size, fields | {PP: pp})
            if error is None:
                return None
            errors.append(error)
    # One stage has no virtual and no uneven stages: what several lack says more.
    of_several = any(fields.get(name) for name in (VPP, *STAGES)) and len(errors) > 1
    return errors[1 if of_several and PP not in fields else 0]


def _error(workload: Workload, world_size: int | None, fields: dict[str, Any]) -> str | None:
    try:
        folding = ParallelFolding(**fields)
        validate(workload.arch, workload.upcycling, folding, world_size)
    except UpcyclingError as error:
        return str(error)
    return None


def _units(workload: Workload, world_size: int, hardware: Hardware, given: Given) -> set[int]:
    """Return the sequences of which a batch must be a multiple, one number per kind of mapping."""
    sizes = micro_batch_sizes(workload, given)
    found = set()
    for folding in foldings(workload, world_size, of_job(hardware, world_size), given):
        # Virtual stages take groups of as many microbatches as there are stages.
        virtual = folding.virtual_pipeline_model_parallel_size
        group = folding.pipeline_model_parallel_size if virtual else 1
        each = folding.data_parallel_size(world_size) * group
        found |= {each * size for size in sizes}
    return found


def _of_batch(batch: int, units: set[int]) -> str:
    what = "DP · micro_batch_size, with virtual stages times PP,"
    if batch % gcd(*units):
        return f"{what} is a multiple of {gcd(*units)} in every mapping, and {batch} is not."
    if batch < min(units):
        return f"{what} is at least {min(units)}, more than the batch."
    return f"{batch} is no multiple of {what} in any mapping."


def _batches(batch: int, world_size: int, units: set[int]) -> list[int]:
    """Return the nearest smaller and larger batch with a mapping: round numbers, if there are any.

    A multiple of the GPUs, times a power of two, divides in many ways.
    """
    if not units:
        return []
    step = lcm(world_size, gcd(*units))
    while 8 * step <= batch:
        step *= 2
    multiples = [n for n in (batch // step * step, -(-batch // step) * step) if n]
    found = [n for n in multiples if any(n % unit == 0 for unit in units)]
    if found:
        return found
    smaller = max(batch // unit * unit for unit in units)
    larger = min(-(-batch // unit) * unit for unit in units)
    return [number for number in (smaller, larger) if number]


def _or(values: list[Any]) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last

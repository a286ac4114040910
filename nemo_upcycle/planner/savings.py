"""Save memory in the optimizer, where nothing fits with its whole state on the GPUs in fp32."""

from collections.abc import Iterable, Iterator, Sequence

from nemo_upcycle.config import OptimizerStorage
from nemo_upcycle.planner.hardware import Hardware
from nemo_upcycle.planner.optimizer import host_bytes, host_suffices
from nemo_upcycle.planner.search import Prediction, fitting, least_of
from nemo_upcycle.planner.workload import Mapping, Workload

GIB = 2**30

SAVINGS = (
    *(OptimizerStorage(optimizer_offload_fraction=quarters / 4) for quarters in (1, 2, 3, 4)),
    OptimizerStorage(optimizer_state="bf16"),
    OptimizerStorage(optimizer_state="bf16", grad_reduce_in_fp32=False),
    OptimizerStorage(optimizer_offload_fraction=1.0, grad_reduce_in_fp32=False),
)
"""Ways to store the optimizer. First those that lose no precision, of which the fastest is taken;
then the others, the most precise first, of which the first that fits is taken."""

_LOSSES = {
    "optimizer_state": "Adam's moments have 8 bits of precision instead of 24, as in the training "
    "of arXiv 2412.19437",
    "grad_reduce_in_fp32": "gradients are summed in bf16 over {microbatches} microbatches, with 8 "
    "bits of precision",
}
"""What is less precise, by the field that is not fp32."""


def on_hosts(
    workload: Workload, hardware: Hardware, every: Iterable[list[Mapping]]
) -> Iterator[list[Mapping]]:
    """Yield the groups of mappings whose offloaded state fits into the nodes' own memory."""
    # Recompute, in which the mappings of a group differ, moves no state.
    return (group for group in every if host_suffices(workload, group[0], hardware))


def with_savings(
    workload: Workload,
    hardware: Hardware,
    every: Sequence[list[Mapping]],
    savings: Sequence[OptimizerStorage],
) -> list[Prediction]:
    """Return the mappings that fit with the best of several ways to store the optimizer.

    Args:
        workload: Model and batch, for which nothing fits.
        hardware: The GPUs.
        every: Groups of mappings, as of `mappings_of`.
        savings: Ways to store the optimizer, in the order of `SAVINGS`.

    Returns:
        As `fitting`; empty if nothing fits.
    """
    exact: list[list[Prediction]] = []
    for storage in savings:
        saved = workload.storing(storage)
        if _lost(storage) and exact:
            break
        found = fitting(saved, hardware, on_hosts(saved, hardware, every))
        if found and _lost(storage):
            return found
        if found:
            exact.append(found)
    return min(exact, key=lambda found: found[0].time.total, default=[])


def _lost(storage: OptimizerStorage) -> list[str]:
    """Return the fields of a way to store the optimizer that lose precision."""
    return [name for name in _LOSSES if name in storage.chosen]


def cost(
    best: Prediction,
    workload: Workload,
    every: Sequence[list[Mapping]],
    would_fit: Sequence[str],
) -> str:
    """Say what saving memory in the optimizer costs.

    Args:
        best: The prediction with the saving.
        workload: Model and batch, without the saving.
        every: Groups of mappings that do not fit.
        would_fit: What would fit without the saving, in words.
    """
    storage, mapping = best.workload.optimizer, best.mapping
    least = least_of(workload, best.hardware, every).memory.total / GIB
    costs = []
    if storage.optimizer_offload_fraction:
        node = host_bytes(best.workload, mapping, best.hardware) / GIB
        spent = best.time.optimizer / best.time.total
        costs += [
            f"{node:.0f} GiB of each node's own memory",
            f"{best.time.optimizer:.1f} s or {spent:.0%} of the step",
        ]
    microbatches = mapping.microbatches(workload.global_batch_size)
    lost = [_LOSSES[name].format(microbatches=microbatches) for name in _lost(storage)]
    *others, last = [*costs, *(lost or ["no precision"])]
    costs_in_words = f"{', '.join(others)} and {last}" if others else last
    return (
        f"With the whole optimizer in fp32 on the GPUs nothing fits: the least is {least:.0f} GiB "
        f"per GPU. Hence {storage}, which costs {costs_in_words} (read in Megatron's code, not "
        "run on GPUs yet)."
        + (f" Without it, this would fit: {'; or '.join(would_fit)}." if would_fit else "")
    )

"""A recipe with the mapping for a trial on CPU, and whether this machine's memory suffices."""

from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import replace
from math import gcd

from nemo_upcycle_recipes.expectations import mapping, workload
from nemo_upcycle_recipes.recipe import Recipe

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture
from nemo_upcycle.planner.host import GIB, available, host_memory
from nemo_upcycle.planner.remedies import fewer_experts

MICRO_BATCH_SIZES: tuple[int, ...] = (4, 2, 1)
RECOMPUTES: tuple[str, ...] = ("none", "moe", "full")
"""The choices on CPU, the fastest first; `moe_act` needs a GPU."""


def on_host(recipe: Recipe, names: Collection[str], check: bool = True) -> Recipe:
    """Return the recipe with the mapping for its ranks on this machine.

    Experts are spread over as many ranks as divide them. Microbatch and recompute are the first
    that fit, from the fastest to the smallest.

    Args:
        recipe: The recipe; its GPUs are ranks here.
        names: Arguments that were given, which the mapping keeps.
        check: Whether to refuse what does not fit.

    Raises:
        UpcyclingError: This machine's memory does not suffice, or the batch does not divide.
    """
    ways = list(_ways(recipe, names))
    if not ways:
        raise UpcyclingError(
            f"A global batch of {recipe.schedule.global_batch_size} does not divide by the "
            f"micro_batch_size and the data-parallel ranks of {recipe.world_size}; use other sizes."
        )
    there = available()
    for way in ways:
        if there is None or needed(way) <= there:
            return way
    if check:
        raise UpcyclingError(shortage(ways[-1], there or 0))
    return ways[-1]


_last: list[tuple[Recipe, Architecture]] = []


def remember(recipe: Recipe, arch: Architecture, ranks: int) -> None:
    """Remember what this process is about to launch on CPU, for `advice`.

    Args:
        recipe: The recipe.
        arch: The dense model's architecture.
        ranks: Ranks on this machine.
    """
    _last[:] = [(replace(recipe, num_nodes=1, num_gpus_per_node=ranks), arch)]


def advice() -> str:
    """Say how much memory the last recipe on CPU needs, and what would need less; or nothing."""
    for recipe, arch in _last:
        with suppress(UpcyclingError):  # the mapping does not fit the ranks
            return (
                f"{recipe.world_size} rank(s) were expected to need "
                f"{needed(recipe, arch) / GIB:.1f} GiB, {(available() or 0) / GIB:.1f} GiB are "
                "available now. Use fewer ranks, fewer experts, shorter sequences, "
                "micro_batch_size=1 with recompute='full', or a machine with more memory."
            )
    return ""


def needed(recipe: Recipe, arch: Architecture | None = None) -> float:
    """Return the bytes that all ranks of a recipe need together, on this machine."""
    return recipe.world_size * host_memory(workload(recipe, arch), mapping(recipe)).total


def shortage(recipe: Recipe, there: int) -> str:
    """Say how much memory is missing, and what would fit.

    Args:
        recipe: The recipe, with the mapping that needs the least.
        there: Bytes that this machine still has.
    """
    need, each = needed(recipe), host_memory(workload(recipe), mapping(recipe))
    would = [
        f"num_moe_experts={fewer.num_moe_experts}"
        for fewer in fewer_experts(recipe.upcycling)
        if needed(_with_fewer(recipe, fewer.num_moe_experts or 0)) <= there
    ][:1]
    if recipe.world_size > 1:
        would.append("fewer ranks")
    would.append("a machine or GPUs with more memory")
    return (
        f"The run needs {need / GIB:.1f} GiB of this machine's memory, {(need - there) / GIB:.1f} "
        f"GiB more than the {there / GIB:.1f} GiB that are available: {recipe.world_size} "
        f"{'ranks' if recipe.world_size > 1 else 'rank'} with {each.state / GIB:.1f} GiB of "
        f"parameters, gradients and optimizer state each, {each.saving / GIB:.1f} GiB for saving "
        f"them, {each.activations / GIB:.1f} GiB of activations. "
        f"Use {', or '.join(would)}."
    )


def _with_fewer(recipe: Recipe, experts: int) -> Recipe:
    folding = recipe.folding
    ranks = gcd(experts, folding.expert_model_parallel_size)
    return replace(
        recipe,
        upcycling=replace(recipe.upcycling, num_moe_experts=experts),
        folding=replace(folding, expert_model_parallel_size=ranks),
    )


def _ways(recipe: Recipe, names: Collection[str]) -> Iterator[Recipe]:
    """Yield the recipe in all ways that its ranks and the given arguments allow, fastest first."""
    experts = recipe.upcycling.num_moe_experts
    folding = recipe.folding
    if experts is not None and "expert_model_parallel_size" not in names:
        attention = folding.expert_tensor_parallel_size * folding.pipeline_model_parallel_size
        spread = gcd(experts, max(1, recipe.world_size // attention))
        folding = replace(folding, expert_model_parallel_size=spread)
    batches, recomputes = MICRO_BATCH_SIZES, RECOMPUTES
    if "micro_batch_size" in names:
        batches = (recipe.schedule.micro_batch_size,)
    if "recompute" in names:
        recomputes = (recipe.recompute,)
    for recompute in recomputes:
        if recompute == "moe" and experts is None and "recompute" not in names:
            continue
        for batch in batches:
            way = replace(
                recipe,
                folding=folding,
                schedule=replace(recipe.schedule, micro_batch_size=batch),
                recompute=recompute,
            )
            if mapping(way).microbatches(recipe.schedule.global_batch_size):
                yield way

"""A recipe with the mapping that the planner chooses for a number of GPUs."""

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from nemo_upcycle_recipes.arguments import defaults
from nemo_upcycle_recipes.expectations import mapping, workload
from nemo_upcycle_recipes.recipe import OF_OPTIMIZER, Recipe

from nemo_upcycle.checkpoint.described import config_alone
from nemo_upcycle.config import PRECISIONS, OptimizerStorage
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture
from nemo_upcycle.planner.hardware import Hardware
from nemo_upcycle.planner.nodes import nodes_of, of_job, with_nodes
from nemo_upcycle.planner.savings import SAVINGS
from nemo_upcycle.planner.search import Prediction, predict
from nemo_upcycle.planner.space import Allowed, Given, everything, mappings_of
from nemo_upcycle.planner.tuning import Tuning, tune
from nemo_upcycle.planner.workload import STAGES, Workload

GPUS = ("num_nodes", "num_gpus_per_node")
"""Arguments that say how many GPUs there are."""

DEFAULT_HARDWARE = "h100"
"""The hardware that the recipe for any model assumes on a machine without a GPU."""


@dataclass(frozen=True)
class Tuned:
    """A recipe with the fastest mapping that fits, and why.

    Attributes:
        recipe: The recipe, with the mapping, microbatch, recompute, storage of the optimizer and
            nodes.
        tuning: The result of the search.
    """

    recipe: Recipe
    tuning: Tuning


def tuned(
    recipe: Recipe,
    values: Mapping[str, Any],
    world_size: int,
    hardware: Hardware,
    arch: Architecture | None = None,
) -> Tuned:
    """Return the recipe with the fastest mapping that fits.

    Args:
        recipe: The recipe.
        values: Arguments that were given, which the mapping keeps.
        world_size: Number of GPUs.
        hardware: The GPUs.
        arch: The dense model's architecture, if not the recipe's own.

    Raises:
        UpcyclingError: No mapping fits; the message says by how much, and what would. Or the GPUs
            do not spread evenly over nodes.
    """
    trained, allowed = workload(recipe, arch), as_given(recipe, values)
    hardware = nodes_as_given(values, world_size, hardware)
    nodes, per_node = _nodes(trained, world_size, hardware, allowed)
    own = _own(recipe, world_size, hardware, arch)
    found = tune(trained, world_size, hardware, allowed, own, _savings(recipe, values))
    best = found.best[0].mapping
    chosen = replace(
        recipe,
        folding=best.folding,
        schedule=replace(recipe.schedule, micro_batch_size=best.micro_batch_size),
        recompute=best.recompute,
        **vars(found.best[0].workload.optimizer),
        num_nodes=nodes,
        num_gpus_per_node=per_node,
    )
    return Tuned(chosen, found)


def nodes_as_given(values: Mapping[str, Any], gpus: int, hardware: Hardware) -> Hardware:
    """Return the hardware with as many GPUs per node as were given.

    Args:
        values: Arguments that were given.
        gpus: Number of GPUs.
        hardware: The GPUs and their nodes.

    Raises:
        UpcyclingError: The nodes and the GPUs per node that were given are not this number of GPUs.
    """
    given = {name: values[name] for name in GPUS if name in values}
    if not given:
        return hardware
    nodes = given.get("num_nodes") or max(1, gpus // given["num_gpus_per_node"])
    each = given.get("num_gpus_per_node") or max(1, gpus // nodes)
    if nodes * each != gpus:
        said = " and ".join(f"{name}={value}" for name, value in given.items())
        near = sorted(
            {nodes * each, (nodes + 1) * each if "num_nodes" not in given else nodes * each}
        )
        raise UpcyclingError(
            f"{gpus} GPUs are asked for, but {said} does not make {gpus}; expected "
            f"{' or '.join(map(str, near))} GPUs, or leave {' and '.join(given)} out."
        )
    return with_nodes(hardware, each)


def _nodes(
    trained: Workload, world_size: int, hardware: Hardware, allowed: Allowed
) -> tuple[int, int]:
    """Return nodes and GPUs per node; an error proposes numbers of GPUs that have a mapping."""

    def works(gpus: int) -> bool:
        return any(mappings_of(trained, gpus, of_job(hardware, gpus), allowed))

    return nodes_of(world_size, hardware.gpus_per_node, works)


def as_given(recipe: Recipe, names: Collection[str]) -> Allowed:
    """Allow only mappings that keep the arguments that were given.

    Args:
        recipe: The recipe, with the arguments.
        names: Their names.
    """
    folding = {name: value for name, value in vars(recipe.folding).items() if name in names}
    batch = recipe.schedule.micro_batch_size if "micro_batch_size" in names else None
    recompute = recipe.recompute if "recompute" in names else None
    multiple_of = prod(getattr(recipe, name) for name in GPUS if name in names)
    given = Given(folding, batch, recompute, multiple_of)
    return everything if given == Given() else given


def _savings(recipe: Recipe, names: Collection[str]) -> list[OptimizerStorage]:
    """Return the ways to store the optimizer that keep the arguments that were given."""
    if not PRECISIONS[recipe.precision].has_savings:
        return []
    given = {*names} & {*OF_OPTIMIZER}
    return [
        storage
        for storage in SAVINGS
        if all(getattr(storage, name) == getattr(recipe, name) for name in given)
    ]


def _own(
    recipe: Recipe, world_size: int, hardware: Hardware, arch: Architecture | None
) -> Prediction | None:
    """Predict the recipe's own mapping, if there is one for this number of GPUs."""
    if recipe.described is not None:
        return None
    own = replace(mapping(recipe), world_size=world_size)
    try:
        return predict(workload(recipe, arch), own, hardware)
    except UpcyclingError:
        return None


def command(
    chosen: Recipe, names: Collection[str], dense: str | None, hardware: str = DEFAULT_HARDWARE
) -> str:
    """Return the command that trains with a recipe's mapping.

    Args:
        chosen: The recipe with the mapping.
        names: Arguments that were given, which the command repeats.
        dense: The dense checkpoint; None for the recipe's own.
        hardware: Name or file of the hardware, which the recipe for any model checks memory with.
    """
    known = defaults(chosen)
    values = {name: value for name, value in known.items() if name in names}
    experts = chosen.upcycling.num_moe_experts
    if {*names} & {"num_moe_experts", "expansion_rate"}:
        values |= {"num_moe_experts": experts}
        values.pop("expansion_rate", None)
    values |= {"num_nodes": chosen.num_nodes, "num_gpus_per_node": chosen.num_gpus_per_node}
    values |= chosen.folding.parallel_sizes
    values |= {name: value for name in STAGES if (value := getattr(chosen.folding, name))}
    values |= {"micro_batch_size": chosen.schedule.micro_batch_size, "recompute": chosen.recompute}
    values |= chosen.optimizer.chosen
    keeps_dense = chosen.described is not None and experts is None
    arguments = [
        f"{name}={_typed(value)}"
        for name, value in values.items()
        if name in known or (name == "num_moe_experts" and keeps_dense)
    ]
    if dense is not None:
        directory = config_alone(dense) or dense
        arguments.insert(0, f"dense_checkpoint={_typed(str(directory))}")
    if chosen.described is not None and hardware != DEFAULT_HARDWARE:
        file = Path(hardware).expanduser()
        arguments.append(f"hardware={_typed(str(file.resolve() if file.is_file() else hardware))}")
    factory = f"{chosen.name}({', '.join(arguments)})"
    return f"nemo llm pretrain --factory {_quoted(factory)}"


def _quoted(text: str) -> str:
    """Quote a word for a shell; in double quotes where nothing in the word has a meaning there."""
    return shlex.quote(text) if {*text} & {*'"$`\\!'} else f'"{text}"'


def _typed(value: object) -> str:
    """Write a value for NeMo-Run's command line, which splits at commas, also inside quotes."""
    if not isinstance(value, str):
        return str(value)
    quote = '"' if "'" in value else "'"
    return f"{quote}{value.replace(',', ';')}{quote}"

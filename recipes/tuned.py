"""A recipe with the mapping that the planner chooses for a number of GPUs."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from nemo_upcycle_recipes.arguments import defaults
from nemo_upcycle_recipes.expectations import mapping, workload
from nemo_upcycle_recipes.recipe import OF_OPTIMIZER, Recipe
from nemo_upcycle_recipes.scaled import nodes_of

from nemo_upcycle.checkpoint.described import config_alone
from nemo_upcycle.config import ACCOUNTED_LAYERS, UNEVEN_STAGES, OptimizerStorage
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture
from nemo_upcycle.planner.hardware import Hardware
from nemo_upcycle.planner.savings import SAVINGS
from nemo_upcycle.planner.search import Allowed, Prediction, everything, predict
from nemo_upcycle.planner.tuning import Tuning, tune
from nemo_upcycle.planner.workload import Mapping


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
    names: Collection[str],
    world_size: int,
    hardware: Hardware,
    arch: Architecture | None = None,
) -> Tuned:
    """Return the recipe with the fastest mapping that fits.

    Args:
        recipe: The recipe.
        names: Arguments that were given, which the mapping keeps.
        world_size: Number of GPUs.
        hardware: The GPUs.
        arch: The dense model's architecture, if not the recipe's own.

    Raises:
        UpcyclingError: No mapping fits; the message says by how much, and what would.
    """
    trained, allowed = workload(recipe, arch), as_given(recipe, names)
    own = _own(recipe, world_size, hardware, arch)
    found = tune(trained, world_size, hardware, allowed, own, _savings(recipe, names))
    best = found.best[0].mapping
    nodes, per_node = nodes_of(world_size, hardware.gpus_per_node)
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


def as_given(recipe: Recipe, names: Collection[str]) -> Allowed:
    """Allow only mappings that keep the arguments that were given.

    Args:
        recipe: The recipe, with the arguments.
        names: Their names.

    Raises:
        UpcyclingError: Uneven pipeline stages were given, which are not searched.
    """
    if uneven := sorted({*names} & {*ACCOUNTED_LAYERS, *UNEVEN_STAGES}):
        raise UpcyclingError(
            f"{uneven[0]} is set; tune supports only even pipeline stages. Leave {uneven[0]} out."
        )
    folding = {name: value for name, value in vars(recipe.folding).items() if name in names}
    batch = recipe.schedule.micro_batch_size if "micro_batch_size" in names else None
    recompute = recipe.recompute if "recompute" in names else None
    if not folding and batch is None and recompute is None:
        return everything

    def allowed(mapping: Mapping) -> bool:
        return (
            all(getattr(mapping.folding, name) == value for name, value in folding.items())
            and batch in (None, mapping.micro_batch_size)
            and recompute in (None, mapping.recompute)
        )

    return allowed


def _savings(recipe: Recipe, names: Collection[str]) -> list[OptimizerStorage]:
    """Return the ways to store the optimizer that keep the arguments that were given."""
    if recipe.precision != "bf16-mixed":
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


def command(chosen: Recipe, names: Collection[str], dense: str | None) -> str:
    """Return the command that trains with a recipe's mapping.

    Args:
        chosen: The recipe with the mapping.
        names: Arguments that were given, which the command repeats.
        dense: The dense checkpoint; None for the recipe's own.
    """
    known = defaults(chosen)
    values = {name: value for name, value in known.items() if name in names}
    experts = chosen.upcycling.num_moe_experts
    if {*names} & {"num_moe_experts", "expansion_rate"}:
        values |= {"num_moe_experts": experts}
        values.pop("expansion_rate", None)
    values |= {"num_nodes": chosen.num_nodes, "num_gpus_per_node": chosen.num_gpus_per_node}
    values |= chosen.folding.parallel_sizes
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
    return f'nemo llm pretrain --factory "{chosen.name}({", ".join(arguments)})"'


def _typed(value: object) -> str:
    """Write a value for NeMo-Run's command line, which splits at commas, also inside quotes."""
    return "'" + value.replace(",", ";") + "'" if isinstance(value, str) else str(value)

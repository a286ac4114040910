"""`nemo-upcycle tune`: which mapping to train with, and the predicted memory and step time."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemo_upcycle.cli.plan import Dense, RecipeName, Settings, dense_model
from nemo_upcycle.cli.tools import check_picture, one_line_errors
from nemo_upcycle.progress import progress

if TYPE_CHECKING:
    from nemo_upcycle_recipes.recipe import Recipe

    from nemo_upcycle.checkpoint.described import Dense as DenseModel
    from nemo_upcycle.planner.hardware import Hardware
    from nemo_upcycle.planner.scaling import Point
    from nemo_upcycle.planner.search import Allowed, Prediction
    from nemo_upcycle.planner.workload import Mapping, Workload


@one_line_errors
def tune(
    settings: Settings = None,
    recipe: RecipeName = "llama3_8b_e8t2",
    dense: Dense = None,
    gpus: Annotated[
        int | None,
        typer.Option(help="Number of GPUs. Default: the recipe's.", min=1, show_default=False),
    ] = None,
    hardware: Annotated[
        str,
        typer.Option(help="h100, h200, a100, b200, gb200, or a YAML file of your own."),
    ] = "h100",
    top: Annotated[int, typer.Option(help="Number of mappings to show.", min=1)] = 5,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    scaling: Annotated[
        Path | None,
        typer.Option(
            help="Plot step time, MFU, memory and loading from 8 to 4,096 GPUs "
            "(.png, .svg, .pdf), and print the table.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Find the fastest mapping that fits: predict and rank all foldings of a number of GPUs.

    Searches over TP, CP, PP, virtual PP, EP, ETP, microbatch size and recompute; what KEY=VALUE
    sets stays fixed. Needs no GPU and no weights.

    Hardware of your own is a YAML file, with the differences from a `base`:

    \b
      base: h100
      name: our cluster
      network_bandwidth: 25   # GB/s per GPU, in each direction

    \b
    Examples:
      nemo-upcycle tune --gpus 128
      nemo-upcycle tune --gpus 128 --dense /models/Meta-Llama-3-8B
      nemo-upcycle tune --recipe llama31_70b_e8t2 --gpus 512 --hardware h200
      nemo-upcycle tune --gpus 64 moe_expert_capacity_factor=1 recompute=none
      nemo-upcycle tune --hardware our.yaml --scaling scaling.png
    """
    import json as json_module

    from nemo_upcycle_recipes.arguments import override
    from nemo_upcycle_recipes.expectations import workload
    from nemo_upcycle_recipes.numbers import recipe_named
    from rich.console import Console

    from nemo_upcycle.planner.hardware import hardware as read_hardware
    from nemo_upcycle.planner.report import point_json, render, scaling_table, to_json
    from nemo_upcycle.planner.tuning import tune

    if scaling is not None:
        check_picture(scaling)
    kind = read_hardware(hardware)
    chosen = override(recipe_named(recipe), settings or [])
    world_size = chosen.world_size if gpus is None else gpus
    allowed = _as_said(chosen, settings or [])
    model = dense_model(chosen, dense)
    trained = workload(chosen, model.arch)
    tuning = tune(trained, world_size, kind, allowed, own=_own(chosen, trained, world_size, kind))
    points = _scaling(chosen, trained, model, kind, allowed, scaling) if scaling else []
    if json:
        both = to_json(tuning, top) | ({"scaling": list(map(point_json, points))} if points else {})
        typer.echo(json_module.dumps(both))
        return
    console = Console(highlight=False)
    title = f"{recipe} on {world_size} {kind.name}, {trained.global_batch_size} sequences per step"
    command = _command(chosen, tuning.best[0], settings or [], kind, dense)
    console.print(render(tuning, title, command, top))
    if scaling:
        console.print(scaling_table(points))
        typer.echo(scaling)


def _as_said(recipe: "Recipe", settings: list[str]) -> "Allowed":
    """Allow only mappings that keep the settings of the command line."""
    from nemo_upcycle_recipes.arguments import plain_name

    from nemo_upcycle.config import ACCOUNTED_LAYERS, UNEVEN_STAGES
    from nemo_upcycle.errors import UpcyclingError

    names = {plain_name(setting.partition("=")[0]) for setting in settings}
    if uneven := sorted(names & {*ACCOUNTED_LAYERS, *UNEVEN_STAGES}):
        raise UpcyclingError(
            f"{uneven[0]} is set; tune supports only even pipeline stages. Leave {uneven[0]} out."
        )
    folding = {name: value for name, value in vars(recipe.folding).items() if name in names}
    batch = recipe.schedule.micro_batch_size if "micro_batch_size" in names else None
    recompute = recipe.recompute if "recompute" in names else None

    def allowed(mapping: "Mapping") -> bool:
        return (
            all(getattr(mapping.folding, name) == value for name, value in folding.items())
            and batch in (None, mapping.micro_batch_size)
            and recompute in (None, mapping.recompute)
        )

    return allowed


def _own(
    recipe: "Recipe", trained: "Workload", world_size: int, hardware: "Hardware"
) -> "Prediction | None":
    """Predict the recipe's own mapping, if this number of GPUs supports the mapping."""
    from nemo_upcycle_recipes.expectations import mapping

    from nemo_upcycle.errors import UpcyclingError
    from nemo_upcycle.planner.search import predict

    own = replace(mapping(recipe), world_size=world_size)
    try:
        return predict(trained, own, hardware)
    except UpcyclingError:
        return None


def _scaling(
    recipe: "Recipe",
    trained: "Workload",
    dense: "DenseModel",
    hardware: "Hardware",
    allowed: "Allowed",
    path: Path,
) -> "list[Point]":
    from nemo_upcycle.planner.picture import draw_scaling
    from nemo_upcycle.planner.scaling import GPUS, scaling

    points = []
    with progress("scaling") as show:
        for point in scaling(trained, dense, hardware, GPUS, allowed):
            points.append(point)
            show(len(points), len(GPUS))
    batch = recipe.schedule.global_batch_size
    title = f"{recipe.name} on {hardware.name}, {batch} sequences per step"
    draw_scaling(points, title, path)
    return points


def _command(
    recipe: "Recipe",
    best: "Prediction",
    settings: list[str],
    hardware: "Hardware",
    dense: str | None,
) -> str:
    """Return the command that trains with a mapping."""
    from nemo_upcycle_recipes.arguments import defaults, plain_name

    mapping = best.mapping
    per_node = min(hardware.gpus_per_node, mapping.world_size)
    said = {plain_name(setting.partition("=")[0]) for setting in settings}
    values = {name: value for name, value in defaults(recipe).items() if name in said}
    if said & {"num_moe_experts", "expansion_rate"}:
        values |= {"num_moe_experts": recipe.upcycling.num_moe_experts}
        values.pop("expansion_rate", None)
    values |= {"num_nodes": -(-mapping.world_size // per_node), "num_gpus_per_node": per_node}
    values |= mapping.folding.parallel_sizes
    values |= {"micro_batch_size": mapping.micro_batch_size, "recompute": mapping.recompute}
    known = defaults(recipe)
    arguments = [f"{name}={_typed(value)}" for name, value in values.items() if name in known]
    if dense is not None:
        arguments.insert(0, f"dense_checkpoint={_typed(dense)}")
    return f'nemo llm pretrain --factory "{recipe.name}({", ".join(arguments)})"'


def _typed(value: object) -> str:
    """Write a value for NeMo-Run's command line, which splits at commas, also inside quotes."""
    return "'" + value.replace(",", ";") + "'" if isinstance(value, str) else str(value)

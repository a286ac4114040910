"""`nemo-upcycle tune`: which mapping to train with, and the predicted memory and step time."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_upcycle.cli.experts import Experts, Granularity, Layers, TopK, expert_settings
from nemo_upcycle.cli.plan import (
    DEFAULT,
    Dense,
    RecipeName,
    Settings,
    dense_model,
    recipe_for,
)
from nemo_upcycle.cli.tools import check_picture, one_line_errors
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.progress import progress

if TYPE_CHECKING:
    from nemo_upcycle_recipes.recipe import Recipe

    from nemo_upcycle.checkpoint.described import Dense as DenseModel
    from nemo_upcycle.planner.hardware import Hardware
    from nemo_upcycle.planner.scaling import Point
    from nemo_upcycle.planner.search import Allowed
    from nemo_upcycle.planner.workload import Workload


@one_line_errors
def tune(
    settings: Settings = None,
    recipe: RecipeName = None,
    dense: Dense = None,
    experts: Experts = None,
    topk: TopK = None,
    granularity: Granularity = None,
    layers: Layers = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            help="Number of GPUs. Default: the recipe's; with --dense and no recipe, the fewest "
            "nodes that fit.",
            min=1,
            show_default=False,
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            help="h100, h200, a100, b200, gb200, or a YAML file of your own. Default: h100.",
            show_default=False,
        ),
    ] = None,
    measured: Annotated[
        str | None,
        typer.Option(
            help="Instead of --hardware: what `nemo-upcycle check` measured on your cluster, its "
            "hardware.yaml or its directory.",
            show_default=False,
        ),
    ] = None,
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
      nemo-upcycle tune --dense /models/Qwen3-8B --gpus 8 --experts 4
      nemo-upcycle tune --recipe llama31_70b_e8t2 --gpus 512 --hardware h200
      nemo-upcycle tune --gpus 64 moe_expert_capacity_factor=1 recompute=none
      nemo-upcycle tune --measured check/hardware.yaml --gpus 64
      nemo-upcycle tune --hardware our.yaml --scaling scaling.png
    """
    import json as json_module

    from nemo_upcycle_recipes.arguments import parse, with_arguments
    from nemo_upcycle_recipes.expectations import workload
    from nemo_upcycle_recipes.numbers import recipe_named
    from nemo_upcycle_recipes.tuned import DEFAULT_HARDWARE, as_given, command, tuned
    from rich.console import Console

    from nemo_upcycle.planner.hardware import hardware as read_hardware
    from nemo_upcycle.planner.hardware import measured_hardware
    from nemo_upcycle.planner.report import point_json, render, scaling_table, to_json

    if scaling is not None:
        check_picture(scaling)
    if measured is not None and hardware is not None:
        raise UpcyclingError(
            f"Both --hardware {hardware} and --measured {measured} are given; give one of them. "
            "The measured file has the rest of the data sheet too."
        )
    kind = measured_hardware(measured) if measured else read_hardware(hardware or DEFAULT_HARDWARE)
    file = measured and str(
        Path(measured) / "hardware.yaml" if Path(measured).is_dir() else measured
    )
    given = expert_settings(experts=experts, topk=topk, granularity=granularity, layers=layers)
    words = [*given, *(settings or [])]
    values: Mapping[str, Any]
    if recipe is None and dense is not None:
        chosen, values = recipe_for(dense, words, gpus, kind)
    else:
        own = recipe_named(recipe or DEFAULT)
        values = parse(own, words)
        chosen = with_arguments(own, values)
    model = dense_model(chosen, dense)
    world_size = chosen.world_size if gpus is None else gpus
    found = tuned(chosen, values, world_size, kind, model.arch)
    trained, allowed = workload(chosen, model.arch), as_given(chosen, values)
    points = _scaling(chosen, trained, model, kind, allowed, scaling) if scaling else []
    if json:
        shown = to_json(found.tuning, top)
        both = shown | ({"scaling": list(map(point_json, points))} if points else {})
        typer.echo(json_module.dumps(both))
        return
    console = Console(highlight=False)
    title = (
        f"{chosen.name} on {world_size} {kind.name}, {trained.global_batch_size} sequences per step"
    )
    line = command(found.recipe, values, dense, file or hardware or DEFAULT_HARDWARE)
    console.print(render(found.tuning, title, top))
    console.print("\nTrain with the first mapping:", style="bold")
    typer.echo(line)  # on one line, whatever the terminal's width: a break would be copied
    if scaling:
        console.print(scaling_table(points))
        typer.echo(scaling)


def _scaling(
    recipe: "Recipe",
    trained: "Workload",
    dense: "DenseModel",
    hardware: "Hardware",
    allowed: "Allowed",
    path: Path,
) -> "list[Point]":
    from nemo_upcycle.planner.picture import draw_scaling
    from nemo_upcycle.planner.scaling import scaling, sizes

    points, every = [], sizes(hardware)
    with progress("scaling") as show:
        for point in scaling(trained, dense, hardware, every, allowed):
            points.append(point)
            show(len(points), len(every))
    batch = recipe.schedule.global_batch_size
    title = f"{recipe.name} on {hardware.name}, {batch} sequences per step"
    draw_scaling(points, title, path)
    return points

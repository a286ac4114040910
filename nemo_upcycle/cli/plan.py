"""`nemo-upcycle plan` and `groups`: the work of a job, before launch."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_upcycle.cli.experts import (
    Experts,
    Granularity,
    Initializer,
    Layers,
    TopK,
    expert_settings,
)
from nemo_upcycle.cli.tools import check_picture, one_line_errors

if TYPE_CHECKING:
    from nemo_upcycle_recipes.recipe import Recipe

    from nemo_upcycle.checkpoint.described import Dense as DenseModel
    from nemo_upcycle.planner.hardware import Hardware
    from nemo_upcycle.plans.job import JobPlan

DEFAULT = "llama3_8b_e8t2"
"""The recipe without --recipe and --dense."""

Dense = Annotated[
    str | None,
    typer.Option(
        help="The dense checkpoint: a directory, which may hold config.json alone, a config.json, "
        "or a name in the local hub cache. Default: the recipe's own model.",
        show_default=False,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Arguments of the recipe's factory, or overrides of `nemo llm pretrain`.",
        show_default=False,
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="The recipe. Default: llama3_8b_e8t2; with --dense, upcycle, the recipe for any dense "
        "model.",
        show_default=False,
    ),
]
HardwareName = Annotated[
    str, typer.Option(help="h100, h200, a100, b200, gb200, or a YAML file of your own.")
]
WorldSize = Annotated[
    int | None,
    typer.Option(help="Ranks. Default: num_nodes · num_gpus_per_node.", show_default=False),
]


@one_line_errors
def plan(
    settings: Settings = None,
    recipe: RecipeName = None,
    dense: Dense = None,
    experts: Experts = None,
    topk: TopK = None,
    granularity: Granularity = None,
    layers: Layers = None,
    initializer: Initializer = None,
    rank: Annotated[
        int | None, typer.Option(help="Show the plan of this rank.", show_default=False)
    ] = None,
    world_size: WorldSize = None,
    hardware: HardwareName = "h100",
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what each rank will own, read and write.

    Reads only the headers of a checkpoint. Needs no GPU, no process group and no weights, for any
    number of ranks. With --dense and no recipe, the planner chooses the mapping; the default number
    of ranks is that of the fewest nodes of --hardware that fit.

    \b
    Examples:
      nemo-upcycle plan
      nemo-upcycle plan num_nodes=16 tensor_model_parallel_size=4
      nemo-upcycle plan --dense /models/Meta-Llama-3-8B --experts 4 --world-size 8
      nemo-upcycle plan --recipe llama_tiny_e8t2 --world-size 4
      nemo-upcycle plan --json | jq .job.bytes_to_read
    """
    from nemo_upcycle.planner.hardware import hardware as read_hardware
    from nemo_upcycle.plans.job import plan_job

    given = expert_settings(
        experts=experts, topk=topk, granularity=granularity, layers=layers, initializer=initializer
    )
    words = [*given, *(settings or [])]
    if recipe is None and dense is not None:
        from nemo_upcycle_recipes.tuned import tuned

        kind = read_hardware(hardware)
        fitted, values = recipe_for(dense, words, world_size, kind)
        chosen = tuned(fitted, values, fitted.world_size, kind).recipe
    else:
        chosen = _recipe(recipe, words, world_size)
    job = plan_job(
        dense_model(chosen, dense),
        chosen.upcycling,
        chosen.folding,
        chosen.num_nodes,
        chosen.num_gpus_per_node,
        chosen.precision,
    )
    _print_plan(job, chosen.name, rank, as_json=json)


def dense_model(recipe: "Recipe", source: str | None) -> "DenseModel":
    """Return the dense model of a command."""
    from nemo_upcycle.checkpoint.described import open_dense

    return recipe.dense_model if source is None or recipe.described else open_dense(source)


def recipe_for(
    dense: str, settings: list[str], gpus: int | None, hardware: "Hardware"
) -> "tuple[Recipe, Mapping[str, Any]]":
    """Return the recipe for any dense model, before the mapping, and the values that were given.

    Args:
        dense: The dense checkpoint.
        settings: KEY=VALUE, arguments of the recipe.
        gpus: Number of GPUs. None takes those of the settings, or the fewest nodes that fit.
        hardware: The GPUs.
    """
    from nemo_upcycle_recipes.arguments import parse
    from nemo_upcycle_recipes.expectations import workload
    from nemo_upcycle_recipes.scaled import scaled_recipe
    from nemo_upcycle_recipes.tuned import as_given

    from nemo_upcycle.checkpoint.described import open_dense
    from nemo_upcycle.planner.remedies import fewest_gpus

    model, node = open_dense(dense), hardware.gpus_per_node
    values = parse(scaled_recipe(model, node, node, {}), settings)
    per_node = values.get("num_gpus_per_node", node)
    if gpus is None and {"num_nodes", "num_gpus_per_node"} & {*values}:
        gpus = values.get("num_nodes", 1) * per_node
    if gpus is None:
        one = scaled_recipe(model, node, node, values)
        gpus = fewest_gpus(workload(one), hardware, node, as_given(one, values)) or node
    return scaled_recipe(model, gpus, per_node, values), values


def _recipe(name: str | None, settings: list[str] | None, world_size: int | None) -> "Recipe":
    """Return the recipe with the settings of the command."""
    from nemo_upcycle_recipes.arguments import override
    from nemo_upcycle_recipes.numbers import recipe_named

    chosen = override(recipe_named(name or DEFAULT), settings or [])
    return chosen if world_size is None else chosen.on_ranks(world_size)


def _print_plan(job: "JobPlan", recipe: str, rank: int | None, as_json: bool) -> None:
    import json

    from rich.console import Console

    from nemo_upcycle.plans.report import render, render_rank, to_json

    if as_json:
        typer.echo(json.dumps(to_json(job, recipe, rank)))
    else:
        Console(highlight=False).print(
            render(job, recipe) if rank is None else render_rank(job, recipe, rank)
        )


@one_line_errors
def groups(
    settings: Settings = None,
    recipe: RecipeName = None,
    world_size: WorldSize = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Figure to write (.png, .svg, .pdf).")
    ] = None,
) -> None:
    """Show which ranks work together, and which groups stay inside a node.

    Attention is distributed over TP×CP×DP×PP, experts over ETP×EP×EDP×PP (parallel folding).

    \b
    Examples:
      nemo-upcycle groups
      nemo-upcycle groups expert_model_parallel_size=4 --world-size 128 --out groups.png
    """
    from rich.console import Console

    from nemo_upcycle.plans.groups_report import draw, render

    if out is not None:
        check_picture(out)
    chosen = _recipe(recipe, settings, world_size)
    sizes = chosen.folding, chosen.world_size, chosen.num_gpus_per_node
    Console(highlight=False).print(render(*sizes))
    if out is not None:
        draw(*sizes, out)
        typer.echo(out)

"""`nemo-upcycle plan` and `groups`: the work of a job, before launch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemo_upcycle.cli.tools import check_picture, one_line_errors

if TYPE_CHECKING:
    from nemo_upcycle_recipes.recipe import Recipe

    from nemo_upcycle.checkpoint.described import Dense as DenseModel
    from nemo_upcycle.plans.job import JobPlan

Dense = Annotated[
    str | None,
    typer.Option(
        help="The dense checkpoint: a directory, which may hold config.json alone, or a name in "
        "the local hub cache. Default: the recipe's own model.",
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
RecipeName = Annotated[str, typer.Option("--recipe", help="The recipe.")]
WorldSize = Annotated[
    int | None,
    typer.Option(help="Ranks. Default: num_nodes · num_gpus_per_node.", show_default=False),
]


@one_line_errors
def plan(
    settings: Settings = None,
    recipe: RecipeName = "llama3_8b_e8t2",
    dense: Dense = None,
    rank: Annotated[
        int | None, typer.Option(help="Show the plan of this rank.", show_default=False)
    ] = None,
    world_size: WorldSize = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what each rank will own, read and write.

    Reads only the headers of a checkpoint. Needs no GPU, no process group and no weights, for any
    number of ranks.

    \b
    Examples:
      nemo-upcycle plan
      nemo-upcycle plan num_nodes=16 tensor_model_parallel_size=4
      nemo-upcycle plan --dense /models/Meta-Llama-3-8B --rank 77
      nemo-upcycle plan --recipe llama_tiny_e8t2 --world-size 4
      nemo-upcycle plan --json | jq .job.bytes_to_read
    """
    from nemo_upcycle.plans.job import plan_job

    chosen = _recipe(recipe, settings, world_size)
    job = plan_job(
        dense_model(chosen, dense),
        chosen.upcycling,
        chosen.folding,
        chosen.num_nodes,
        chosen.num_gpus_per_node,
        chosen.precision,
    )
    _print_plan(job, recipe, rank, as_json=json)


def dense_model(recipe: "Recipe", source: str | None) -> "DenseModel":
    """Return the dense model of a command."""
    from nemo_upcycle.checkpoint.described import dense_of_config, open_dense

    if source is not None:
        return open_dense(source)
    return dense_of_config(recipe.config, recipe.dense, "the recipe's own config, no weights")


def _recipe(name: str, settings: list[str] | None, world_size: int | None) -> "Recipe":
    """Return the recipe with the settings of the command."""
    from nemo_upcycle_recipes.arguments import override
    from nemo_upcycle_recipes.numbers import recipe_named

    chosen = override(recipe_named(name), settings or [])
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
    recipe: RecipeName = "llama3_8b_e8t2",
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

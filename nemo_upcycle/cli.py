"""The commands of `nemo-upcycle`, which are those of `nemo upcycle` without NeMo's imports.

Everything heavy is imported inside the functions: `--help` and the light commands answer at once.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from nemo_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from nemo_upcycle.job import JobPlan

app = typer.Typer(
    name="nemo-upcycle",
    help="Upcycle dense LLM checkpoints into Mixture-of-Experts models.\n\n"
    "The training itself is NeMo's: `nemo llm pretrain --factory llama_tiny_e8t2`. "
    "`nemo-upcycle` and `nemo upcycle` are the same commands; the first starts faster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Text, tokenizer and Megatron .bin/.idx files.", no_args_is_help=True)
app.add_typer(data_app, name="data")

P = ParamSpec("P")
Directory = Annotated[Path, typer.Option("--out", "-o", help="Directory to write to.")]


def main() -> None:
    """Run `nemo-upcycle`."""
    app()


def one_line_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Make a command end with one line and exit code 1 on bad input, under `nemo` too."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except UpcyclingError as error:
            typer.secho(f"Error: {error}", err=True, fg=typer.colors.RED)
            raise typer.Exit(1) from None

    return wrapped


@app.command()
def version() -> None:
    """Print the version."""
    from nemo_upcycle import __version__

    typer.echo(__version__)


@data_app.command("sample")
@one_line_errors
def data_sample(out: Directory) -> None:
    """Write real text from this Python's standard library, as two JSONL files.

    `documentation.jsonl` holds its documentation and docstrings, `sources.jsonl` its sources
    without docstrings. 11 MB in all, 3M tokens; nothing is downloaded.
    """
    from nemo_upcycle.data.sample import write_stdlib_sample

    for path in write_stdlib_sample(out).values():
        typer.echo(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


@data_app.command("tokenizer")
@one_line_errors
def data_tokenizer(
    files: Annotated[list[Path], typer.Argument(help="JSONL files with a `text` field.")],
    out: Directory,
    vocab_size: Annotated[int, typer.Option(help="Tokens in the vocabulary.")] = 2048,
) -> None:
    """Train a byte-level BPE tokenizer, in Hugging Face's format."""
    from nemo_upcycle.data.tokenizer import train_tokenizer

    typer.echo(f"{out}: {train_tokenizer(files, out, vocab_size)} tokens")


@data_app.command("tokenize")
@one_line_errors
def data_tokenize(
    files: Annotated[list[Path], typer.Argument(help="JSONL files with a `text` field.")],
    tokenizer: Annotated[Path, typer.Option(help="Directory of the tokenizer.")],
    out: Directory,
) -> None:
    """Write Megatron .bin/.idx files, one pair a JSONL file, named after it."""
    from nemo_upcycle.data.indexed import build_indexed_dataset

    for file in files:
        with _progress(file.name) as progress:
            stats = build_indexed_dataset(file, tokenizer, out / file.stem, progress=progress)
        typer.echo(f"{stats.prefix}: {stats.documents} documents, {stats.tokens} tokens")


@app.command()
@one_line_errors
def compare(
    dense: Annotated[Path, typer.Option(help="TensorBoard logs of the dense run.")],
    moe: Annotated[Path, typer.Option(help="TensorBoard logs of the upcycled run.")],
    out: Directory,
    tokens_per_step: Annotated[
        int, typer.Option(help="Sequence length · global batch size of both runs.")
    ],
) -> None:
    """Compare the losses of two runs: a table, and a picture over tokens."""
    from rich.console import Console

    from nemo_upcycle.training.curves import compare_runs, render

    comparison = compare_runs(dense, moe, out, tokens_per_step=tokens_per_step)
    Console().print(render(comparison))
    typer.echo(f"{comparison.markdown}\n{comparison.picture}")


@app.command()
@one_line_errors
def plan(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Arguments of the recipe, as its factory or `nemo llm pretrain` takes them.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[str, typer.Option(help="The recipe.")] = "llama3_8b_e8t2",
    dense: Annotated[
        str | None,
        typer.Option(
            help="Directory of the dense checkpoint, or of its config.json alone; without it the "
            "recipe's own model.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Show this rank's part.", show_default=False)
    ] = None,
    world_size: Annotated[
        int | None,
        typer.Option(help="Ranks; without it num_nodes · num_gpus_per_node.", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Show what each rank would own, read and write; nothing is read but headers.

    Needs no GPU, no process group and no weights, whatever the number of ranks.

    \b
    Examples:
      nemo-upcycle plan
      nemo-upcycle plan num_nodes=16 tensor_model_parallel_size=4
      nemo-upcycle plan --dense /models/Meta-Llama-3-8B --rank 77
      nemo-upcycle plan --recipe llama_tiny_e8t2 --world-size 4
      nemo-upcycle plan --json | jq .job.bytes_to_read
    """
    from nemo_upcycle_recipes.numbers import override, recipe_named

    from nemo_upcycle.job import dense_of_config, open_dense, plan_job

    chosen = override(recipe_named(recipe), settings or [])
    if world_size is not None:
        chosen = chosen.on_ranks(world_size)
    job = plan_job(
        open_dense(dense)
        if dense
        else dense_of_config(chosen.config, chosen.dense, "the recipe's own config, no weights"),
        chosen.upcycling,
        chosen.folding,
        chosen.num_nodes,
        chosen.num_gpus_per_node,
        chosen.precision,
    )
    _print_plan(job, recipe, rank, as_json=json)


@app.command()
@one_line_errors
def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="NeMo 2 or Megatron-LM checkpoint of an upcycled model.")
    ],
    directory: Annotated[Path, typer.Argument(help="Directory to make.")],
) -> None:
    """Write a trained MoE as a Hugging Face directory, as `transformers` loads it.

    Reads checkpoints saved under any mapping, tensor by tensor, without building a model.
    Mixtral where that computes the same; Qwen2-MoE for softmax before top-k, biases, dense layers
    or a shared expert; Qwen3-MoE for norms of queries and keys; an error where none does.

    \b
    Example:
      nemo-upcycle export demo/e8t2/checkpoints/*-last demo/e8t2_hf
    """
    from nemo_upcycle.export import export

    with _progress(directory.name) as progress:
        plan = export(checkpoint, directory, progress)
    typer.echo(
        f"{directory}: {plan.family.class_name}, {len(plan.outputs)} tensors, "
        f"{plan.bytes / 2**20:,.1f} MiB"
    )


def _print_plan(job: "JobPlan", recipe: str, rank: int | None, as_json: bool) -> None:
    import json

    from rich.console import Console

    from nemo_upcycle.plan_report import render, render_rank, to_json

    if as_json:
        typer.echo(json.dumps(to_json(job, recipe, rank)))
    else:
        Console(highlight=False).print(
            render(job, recipe) if rank is None else render_rank(job, recipe, rank)
        )


def _progress(label: str) -> AbstractContextManager[Callable[[int, int], None] | None]:
    """Show a bar on a terminal, nothing in a log."""

    @contextmanager
    def bar() -> Any:
        from rich.console import Console
        from rich.progress import Progress

        console = Console()
        if not console.is_terminal:
            yield None
            return
        with Progress(console=console) as progress:
            task = progress.add_task(label, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    return bar()


if __name__ == "__main__":
    main()

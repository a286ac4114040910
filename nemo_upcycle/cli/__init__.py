"""The commands of `nemo-upcycle`: those of `nemo upcycle`, without importing NeMo.

Heavy imports are inside the functions, so that `--help` and the light commands start at once.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from nemo_upcycle.cli import data, evaluation, noise
from nemo_upcycle.cli.ablate import ablate
from nemo_upcycle.cli.align import align
from nemo_upcycle.cli.calibrate import calibrate
from nemo_upcycle.cli.check import check
from nemo_upcycle.cli.plan import groups, plan
from nemo_upcycle.cli.tools import (
    Directory,
    before_serving,
    check_file_writable,
    last_checkpoint,
    one_line_errors,
)
from nemo_upcycle.cli.tune import tune
from nemo_upcycle.cli.upcycle import upcycle
from nemo_upcycle.cli.worth import worth
from nemo_upcycle.progress import progress

app = typer.Typer(
    name="nemo-upcycle",
    help="Upcycle dense LLM checkpoints into Mixture-of-Experts models.\n\n"
    "Training is a command of NeMo: `nemo llm pretrain --factory llama_tiny_e8t2`. "
    "`nemo-upcycle` and `nemo upcycle` are the same commands; `nemo-upcycle` starts faster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(data.app, name="data")
app.command()(upcycle)
app.command()(calibrate)
app.command()(align)
app.command()(plan)
app.command()(groups)
app.command()(tune)
app.command()(worth)
app.command()(ablate)
app.command()(check)


def main() -> None:
    """Run `nemo-upcycle`; `-v` is taken before and after the command's name."""
    sys.argv[1:] = noise.take_option(sys.argv[1:])
    app()


@app.callback()
def options(
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="Show what libraries say while they are imported and used; also after the "
            "command's name. NEMO_UPCYCLE_VERBOSE=1 does the same, also for `nemo`.",
        ),
    ] = False,
) -> None:
    """Take the options of all commands."""
    if verbose:
        os.environ[noise.VERBOSE] = "1"


@app.command()
def version() -> None:
    """Print the version."""
    from nemo_upcycle import __version__

    typer.echo(__version__)


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
    """Compare the losses of two runs, in a table and a figure over tokens."""
    from rich.console import Console

    from nemo_upcycle.evaluation.curves import compare_runs, render

    comparison = compare_runs(dense, moe, out, tokens_per_step=tokens_per_step)
    Console().print(render(comparison))
    typer.echo(f"{comparison.markdown}\n{comparison.picture}")


@app.command()
@one_line_errors
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="NeMo 2 or Megatron-LM checkpoint of an upcycled model; or a run's directory, "
            "which means the run's last complete checkpoint."
        ),
    ],
    directory: Annotated[Path, typer.Argument(help="Directory to create.")],
) -> None:
    """Write a trained MoE as a Hugging Face directory that `transformers` loads.

    Reads checkpoints saved under any mapping, tensor by tensor, without building a model.
    The architecture is Mixtral where possible; Qwen2-MoE for softmax before top-k, biases, dense
    layers or a shared expert; Qwen3-MoE for norms of queries and keys. A model that none of these
    computes is an error.

    \b
    Example:
      nemo-upcycle export demo/e8t2 demo/e8t2_hf
    """
    from nemo_upcycle.trained.export import export

    chosen = last_checkpoint(checkpoint)
    with progress(directory.name) as show:
        plan = export(chosen, directory, show)
    typer.echo(
        f"{directory}: {plan.family.class_name}, {len(plan.outputs)} tensors, "
        f"{plan.bytes / 2**20:,.1f} MiB"
    )
    if plan.capacity_factor is not None:
        typer.echo(
            f"The model was trained with capacity factor {plan.capacity_factor:g}, which may drop "
            "tokens; transformers drops none."
        )
    for note in plan.notes:
        typer.echo(f"Note: {note}.")
    before_serving(plan.family.model_type)


@app.command()
@one_line_errors
def report(
    run: Annotated[
        Path,
        typer.Argument(
            help="The run's directory, such as demo/e8t2; or where Megatron-LM or Bridge saves."
        ),
    ],
    dense: Annotated[
        Path | None,
        typer.Option(help="Directory of the run that trains the dense model on."),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="Directory that `evaluate --out` was given. Default: evaluation/ in or beside the "
            "run's directory, if its scores are of this run."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File to write. Default: RUN/report.html."),
    ] = None,
) -> None:
    """Write one HTML page about a run, which needs no network.

    What was upcycled from what and how exactly, loss, learning rate, MFU, load of every expert over
    time, router entropy, drift, scores and process groups. A figure without data says what would
    record the data.

    \b
    Example:
      nemo-upcycle report demo/e8t2 --dense demo/dense_continued
    """
    from nemo_upcycle.report.page import write_report

    if out is not None:
        check_file_writable(out)
    written = write_report(run, dense, scores, out)
    if written.missing:
        typer.echo(f"No data, see the page: {', '.join(written.missing)}", err=True)
    typer.echo(written.path)


app.command()(evaluation.evaluate)
app.command()(evaluation.verify)
app.command()(evaluation.generate)

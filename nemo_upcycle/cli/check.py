"""`nemo-upcycle check`: the first job on a cluster."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemo_upcycle.cli.ranks import on_this_many
from nemo_upcycle.cli.submit import check_settings, submit
from nemo_upcycle.cli.tools import at_least, one_line_errors
from nemo_upcycle.engine.launch import is_first_rank, launched
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.files import check_writable

if TYPE_CHECKING:
    from nemo_upcycle.check.findings import Finding, Outcome

DTYPES = ("float32", "bfloat16")


@one_line_errors
def check(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="run.executor=slurm and run.executor.KEY=VALUE start the check as a job, as with "
            "a recipe; needs NeMo-Run.",
            metavar="[run.executor=NAME]",
            show_default=False,
        ),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(
            help="Dense model whose first layers are checked: a Hugging Face directory, a name in "
            "the local cache, or a config.json, for random weights. Default: a tiny Llama."
        ),
    ] = None,
    layers: Annotated[int, typer.Option(help="Layers of --dense.")] = 4,
    cpu: Annotated[bool, typer.Option("--cpu", help="Check on CPU, over gloo.")] = False,
    ranks: Annotated[
        int | None,
        typer.Option(
            help="Ranks to start on this machine. Default: one per GPU, 2 on CPU. Under torchrun "
            "no ranks are started.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 or bfloat16. Default: bfloat16 on GPUs, float32 on CPU."),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            help="The planner's hardware, a name or a YAML file, to compare bandwidths with. "
            "Default: by the GPU's name."
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Directory to write to; all nodes must see the directory."
        ),
    ] = Path("check"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Check this node or cluster: what upcycling promises, over the mappings that the ranks allow.

    For each mapping: process groups, step 0, export, loading what another mapping saved, loss and
    gradient norm. Then a training is killed and resumed, and the bandwidth of collectives is
    measured. Writes `check.json`, and `hardware.yaml` for `tune --measured`. A failure names the
    mapping, what was found and what was expected, and gives exit code 1.

    \b
    Examples:
      nemo-upcycle check
      nemo-upcycle check --dense /models/Meta-Llama-3-8B --layers 2
      nemo-upcycle check --cpu --ranks 2
      nemo-upcycle check run.executor=slurm run.executor.nodes=2
    """
    at_least("--ranks", ranks, 1)
    at_least("--layers", layers, 1)
    if dtype not in (None, *DTYPES):
        raise UpcyclingError(f"--dtype is {dtype}; expected {' or '.join(DTYPES)}.")
    if settings:
        check_settings(settings)
        check_writable(out)
        raise typer.Exit(submit("check", settings, out))
    if cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks, also on the ranks
    check_writable(out)

    import torch

    gpus = torch.cuda.device_count()
    if not cpu and not gpus:
        raise UpcyclingError("There is no GPU; give --cpu to check on CPU, over gloo.")
    if gpus and not launched() and (ranks or gpus) > gpus:
        raise UpcyclingError(f"--ranks is {ranks}, but there are {gpus} GPUs; give at most {gpus}.")
    if hardware is not None:
        from nemo_upcycle.planner.hardware import hardware as read_hardware

        read_hardware(hardware)
    on_this_many(ranks or gpus or 2)

    from nemo_upcycle.check.job import Check, Options

    chosen = getattr(torch, dtype or ("bfloat16" if gpus else "float32"))
    options = Options(out.resolve(), dense, layers, chosen, hardware)
    outcome = Check(options, _show_progress).run()
    if is_first_rank():
        _show(outcome, as_json)
    if not outcome.passed:
        raise typer.Exit(1)


def _show_progress(finding: "Finding") -> None:
    if is_first_rank():
        mark = "✓" if finding.passed else "✗"
        typer.echo(f"{mark} {finding.mapping}: {finding.check}: {finding.found}", err=True)


def _show(outcome: "Outcome", as_json: bool) -> None:
    from rich.console import Console

    from nemo_upcycle.check.report import lines, tables

    if as_json:
        typer.echo(json.dumps(outcome.to_json()))
        return
    console = Console()
    for table in tables(outcome):
        console.print(table)
    for line in lines(outcome):
        typer.echo(line)
    if outcome.hardware_file:
        typer.echo(f"nemo-upcycle tune --measured {outcome.hardware_file}")

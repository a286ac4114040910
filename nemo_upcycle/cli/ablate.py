"""`nemo-upcycle ablate`: the papers' comparisons with the tiny model, on CPU."""

import os
from pathlib import Path
from typing import Annotated

import typer

from nemo_upcycle.cli.tools import Directory, one_line_errors
from nemo_upcycle.progress import progress


@one_line_errors
def ablate(
    out: Directory,
    study: Annotated[
        list[str] | None,
        typer.Option(
            help="controls, capacity_factor, router, granularity, weight_scaling, learning_rate, "
            "initializers; may be repeated. Default: all.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Trainings per arm.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Steps of the baseline.", min=1)] = 100,
    dir: Annotated[
        Path, typer.Option(help="The demo's directory, with the data and dense_hf.")
    ] = Path("demo"),
    workers: Annotated[
        int | None,
        typer.Option(help="Parallel trainings. Default: one per core.", min=1, show_default=False),
    ] = None,
) -> None:
    """Repeat the papers' comparisons of ways of upcycling, and test the claims at this scale.

    Compares capacity factor, router, granularity, weight scaling, learning-rate reset and
    initialisers. Controls are the dense model trained further and the MoE from scratch, at equal
    tokens and equal FLOPs. Writes ablations.md, .json and .png. Everything takes about an hour and
    2 GiB of memory on 2 cores. After a kill the same command continues, and repeats no finished
    training.

    \b
    Examples:
      make demo
      nemo-upcycle ablate --out ablations
      nemo-upcycle ablate --study router --study learning_rate --seeds 5 --out ablations
    """
    from nemo_upcycle.ablations.runner import ablate
    from nemo_upcycle.ablations.studies import studies_named

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with progress("ablations") as show:
        report = ablate(
            studies_named(study or []), seeds, steps, dir, out, workers or cores or 1, show
        )
    for one in report.studies:
        typer.echo(f"{one.study.name}: {one.study.question}")
        for finding in one.findings:
            typer.echo(f"  {finding.claim.text}: {finding}")
    typer.echo(f"{out / 'ablations.md'}\n{out / 'ablations.png'}")

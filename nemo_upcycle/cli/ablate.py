"""`nemo-upcycle ablate`: the papers' comparisons on CPU, with the tiny model."""

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
            "initializers; may be repeated. Without it all.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each arm.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Steps of the baseline.", min=1)] = 100,
    dir: Annotated[
        Path, typer.Option(help="The demo's directory: its data and dense_hf are used.")
    ] = Path("demo"),
    workers: Annotated[
        int | None,
        typer.Option(help="Trainings at a time; without it one a core.", min=1, show_default=False),
    ] = None,
) -> None:
    """Compare ways of upcycling as the papers do, and say what holds at this scale.

    Capacity factor, router, granularity, weight scaling, learning-rate reset, initialisers, and
    upcycled against dense trained on and from scratch, at equal tokens and equal FLOPs.
    Writes ablations.md, .json and .png. All of it takes about an hour and 2 GiB of memory on 2
    cores. Killed, the same command goes on; a training that is done is not done again.

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

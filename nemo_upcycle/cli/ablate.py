"""`nemo-upcycle ablate`: the papers' comparisons, with the tiny model on CPU or with a recipe."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemo_upcycle.cli.plan import Settings
from nemo_upcycle.cli.tools import Directory, one_line_errors
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.progress import progress

if TYPE_CHECKING:
    from nemo_upcycle.ablations.results import Workspace

TINY = "llama_tiny_e8t2"


@one_line_errors
def ablate(
    out: Directory,
    settings: Settings = None,
    study: Annotated[
        list[str] | None,
        typer.Option(
            help="controls, capacity_factor, router, granularity, weight_scaling, learning_rate, "
            "initializers, data_aware, signals; may be repeated. Default: all. With --recipe: "
            "real_model.",
            show_default=False,
        ),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="Train only these arms of the studies, and the baseline; may be repeated. "
            "ablations.json has their names.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Trainings per arm.", min=1)] = 3,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of the baseline. Default: 100; with --recipe the recipe's, or what fits "
            "--minutes.",
            min=1,
            show_default=False,
        ),
    ] = None,
    dir: Annotated[
        Path, typer.Option(help="The demo's directory, with the data and dense_hf.")
    ] = Path("demo"),
    workers: Annotated[
        int | None,
        typer.Option(help="Parallel trainings. Default: one per core.", min=1, show_default=False),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="An upcycled recipe with a control, such as smollm2_135m_e8t2.")
    ] = TINY,
    accelerator: Annotated[
        str | None,
        typer.Option(help="With --recipe: gpu or cpu. Default: gpu.", show_default=False),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Time for all trainings of this command: decides steps, then seeds, then arms.",
            min=0,
            show_default=False,
        ),
    ] = None,
    min_steps: Annotated[
        int, typer.Option(help="With --minutes: fewer trainings rather than fewer steps.", min=1)
    ] = 100,
    dense: Annotated[
        Path | None,
        typer.Option(help="With --recipe: the dense checkpoint's directory.", show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="With --recipe: prefixes of tokenized data, each with a weight before it. "
            "Default: the text of the installed packages, tokenized in OUT/text.",
            show_default=False,
        ),
    ] = None,
    items: Annotated[
        Path | None,
        typer.Option(
            help="With --data: questions that `data choices` wrote, next_line.jsonl.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Repeat the papers' comparisons of ways of upcycling, and test the claims at this scale.

    Compares capacity factor, router, granularity, weight scaling, learning-rate reset,
    initializers, statistics of the text and training signals. Controls are the dense model trained
    further and the MoE from scratch, at equal tokens and equal FLOPs. Writes ablations.md, .json
    and .png. Everything takes an hour and a half and 2 GiB of memory on 2 cores. After a kill the
    same command continues, and repeats no finished training.

    With --recipe a real model is compared, one training at a time on a GPU. With --minutes short
    trainings measure the time of a step. From this time follow the steps with which all arms and
    seeds fit. Too short trainings are avoided by fewer seeds, then fewer arms; what is left out is
    reported. The same command goes on with the trainings that are missing.

    \b
    Examples:
      make demo
      nemo-upcycle ablate --out ablations
      nemo-upcycle ablate --study router --study learning_rate --seeds 5 --out ablations
      nemo-upcycle ablate --recipe smollm2_135m_e8t2 --dense SmolLM2-135M --minutes 60 --out real
    """
    from nemo_upcycle.ablations.bases import base_of
    from nemo_upcycle.ablations.results import Workspace
    from nemo_upcycle.ablations.runner import Question, ablate
    from nemo_upcycle.ablations.studies import studies_named, with_arms

    real = recipe != TINY
    base = base_of(recipe, accelerator or ("gpu" if real else "cpu"), settings or [])
    studies = with_arms(studies_named(study or [], base), arm or [])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = workers or cores or 1
    if real:
        workspace = _workspace(recipe, dense, data, items, out, workers)
    elif dense or data or items:
        raise UpcyclingError(
            "--dense, --data and --items are for a --recipe; the tiny model takes all from --dir."
        )
    else:
        workspace = Workspace(dir.absolute())
    if steps is None and not real and minutes is None:
        steps = 100
    question = Question(studies, seeds, steps, minutes, min_steps, base)
    with progress("ablations") as show:
        report = ablate(question, workspace, out, workers, show)
    for one in report.studies:
        typer.echo(f"{one.study.name}: {one.study.question}")
        for finding in one.findings:
            typer.echo(f"  {finding.claim.text}: {finding}")
    for left in report.left_out:
        typer.echo(f"left out: {left}")
    typer.echo(f"{out / 'ablations.md'}\n{out / 'ablations.png'}")


def _workspace(
    recipe: str, dense: Path | None, data: str | None, items: Path | None, out: Path, workers: int
) -> "Workspace":
    """Return the dense checkpoint and the data of a recipe's comparison."""
    from nemo_upcycle.ablations.results import Workspace
    from nemo_upcycle.ablations.text import own_text
    from nemo_upcycle.data.paths import parse

    if dense is None:
        raise UpcyclingError(
            f"--recipe {recipe} is given without --dense; expected the directory of the dense "
            "checkpoint, with its tokenizer."
        )
    dense = dense.expanduser().absolute()
    if data is not None:
        return Workspace(out.absolute(), dense, tuple(parse(data)), items)
    with progress("text", in_bytes=True) as show:
        return own_text(dense, out.absolute() / "text", workers, show)

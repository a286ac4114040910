"""The page: one HTML file with its data, style and script, which loads nothing else."""

import base64
import hashlib
import json
import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

import nemo_upcycle
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.files import write_whole
from nemo_upcycle.report.experts import (
    bias_figures,
    drift_figures,
    entropy_figure,
    load_figure,
)
from nemo_upcycle.report.figures import Axis, Figure, loss_figure, rate_figure, speed_figure
from nemo_upcycle.report.mapping import mapping_figure
from nemo_upcycle.report.origin import headline, origin_rows, step_zero, summary, training_rows
from nemo_upcycle.report.runs import Run, read_run
from nemo_upcycle.report.scores import scores_figure

NAME = "report.html"
SCRIPTS = ("base.js", "curves.js", "experts.js", "ranks.js", "start.js")


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        path: The page.
        missing: Titles of the figures that the run has no data for.
    """

    path: Path
    missing: tuple[str, ...]


def write_report(
    run: Path, dense: Path | None = None, scores: Path | None = None, out: Path | None = None
) -> Written:
    """Write the page about a run, whole or not at all.

    Args:
        run: The directory of the run.
        dense: The directory of the run that trains the dense model on; None for none.
        scores: The directory that `evaluate` has written to; None looks in and beside the run's.
        out: The file to write; None means `report.html` in the run's directory.

    Raises:
        UpcyclingError: A directory is not what it should be, or a file in it is damaged.
    """
    read = read_run(run)
    other = None if dense is None else read_run(dense)
    if other is not None and other.experts:
        raise UpcyclingError(
            f"{dense} is a run of {other.experts} experts; expected the run that trains the dense "
            "model on."
        )
    figures = figures_of(read, other, scores)
    path = out or run / NAME
    write_whole(path, page(read, other, figures))
    return Written(path, tuple(figure.title for figure in figures if figure.missing))


def figures_of(run: Run, dense: Run | None, scores: Path | None = None) -> list[Figure]:
    """Return all figures of the page, in order; those without data too."""
    runs = {"moe": run} if dense is None else {"dense": dense, "moe": run}
    both, alone = Axis(list(runs.values())), Axis([run])
    return [
        loss_figure(both, runs),
        load_figure(alone, run),
        entropy_figure(alone, run),
        *bias_figures(alone, run),
        *drift_figures(alone, run),
        scores_figure(run, scores),
        rate_figure(both, runs),
        speed_figure(both, runs),
        mapping_figure(run),
    ]


def page(run: Run, dense: Run | None, figures: list[Figure]) -> str:
    """Return the HTML.

    Args:
        run: The run.
        dense: The run that trains the dense model on; None for none.
        figures: The result of `figures_of`.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = _asset("page.css"), "\n".join(map(_asset, SCRIPTS))
    data = {figure.id: figure.chart for figure in figures if figure.chart is not None}
    return environment.from_string(_asset("page.html")).render(
        name=run.name,
        headline=headline(run),
        dense=dense.name if dense else "",
        step0=step_zero(run, dense),
        summary=summary(run, dense),
        tables=[("Upcycled from", origin_rows(run)), ("Training", training_rows(run))],
        figures=figures,
        version=nemo_upcycle.__version__,
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=_json(data),
    )


def _asset(name: str) -> str:
    return (files("nemo_upcycle.report") / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return what the page's security policy calls a text: only this script may run."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _json(data: Any) -> str:
    """Return JSON that no name in it can end: the browser looks for `</script` in the bytes."""
    text = json.dumps(_short(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _short(value: Any) -> Any:
    """Return data with six digits, and None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _short(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_short(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value

"""The figures over a run's tokens, as plain data that the page's script draws."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_upcycle.evaluation.curves import TRAIN_LOSS, VAL_LOSS, final, smooth
from nemo_upcycle.report.runs import Run

POINTS, LAYER_POINTS, ROWS = 400, 120, 12
"""Maximum numbers of points per curve, per curve of a layer, and of rows in a table."""

_SMOOTHING_FRACTION = 0.05
Point = tuple[float, float]


@dataclass(frozen=True)
class Table:
    """Cells of a table, as text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A figure of the page.

    Attributes:
        id: Name of the figure in links.
        title: Heading.
        caption: What there is to see, in words.
        chart: Data for the page's script; None if the run has none.
        missing: What would record the data; empty if there are data.
        table: The same numbers as text.
    """

    id: str
    title: str
    caption: str = ""
    chart: Mapping[str, Any] | None = None
    missing: str = ""
    table: Table | None = field(default=None)


class Axis:
    """The horizontal axis: training tokens if all runs know theirs, else steps.

    Args:
        runs: The runs that are drawn.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.in_tokens = all(run.tokens_after for run in runs)
        self.label = "training tokens" if self.in_tokens else "training steps"

    def at(self, run: Run, done: float) -> float:
        """Return where `done` steps of a run are."""
        return run.tokens_after(done) if self.in_tokens and run.tokens_after else done

    def curve(self, run: Run, tag: str, *, done: int = 1, most: int = POINTS) -> list[Point]:
        """Return the points of a logged number, thinned to at most `most` means.

        Args:
            run: The run.
            tag: TensorBoard's tag.
            done: Steps done when the number of step 0 is logged: Lightning counts from 0, the
                experts' measurements from 1.
            most: Maximum number of points.
        """
        points = sorted(run.scalars.get(tag, {}).items())
        finite = [(self.at(run, step + done), y) for step, y in points if math.isfinite(y)]
        return thinned(finite, most)


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """Return the first point, and means of equally many neighbors for the others."""
    width = -(-len(points) // most)
    if width <= 1:
        return [*points]
    means = [points[i : i + width] for i in range(1, len(points), width)]
    return [points[0], *((statistics.fmean(x), statistics.fmean(y)) for x, y in _columns(means))]


def _columns(parts: Sequence[Sequence[Point]]) -> list[tuple[list[float], list[float]]]:
    return [([x for x, _ in part], [y for _, y in part]) for part in parts]


def loss_figure(axis: Axis, runs: Mapping[str, Run]) -> Figure:
    """Return the training and validation losses of the run and, if given, of the dense run."""
    title = "Loss"
    if not any(TRAIN_LOSS in run.scalars for run in runs.values()):
        return Figure("loss", title, missing=no_events(TRAIN_LOSS))
    series, ends = [], []
    for role, run in runs.items():
        curve = axis.curve(run, TRAIN_LOSS)
        if not curve:
            continue
        even = smoothed(curve)
        series += [
            line(f"{run.name}, training", role, even),
            line("", role, curve, style="faint"),
        ]
        ends.append(f"{run.name} {final_loss(run):.4f}")
        if validation := axis.curve(run, VAL_LOSS):
            series.append(line(f"{run.name}, validation", role, validation, style="dashed"))
            ends[-1] += f" (validation {validation[-1][1]:.4f})"
    if not series:
        return Figure("loss", title, missing="Every logged loss is NaN or infinite.")
    caption = f"Mean of the last 10% of the steps: {'; '.join(ends)}. Thin lines: single steps."
    if len(runs) == 1:
        caption += " --dense RUN adds the run that trains the dense model on the same tokens."
    return lines("loss", title, caption, axis, "loss (nats per token)", series)


def final_loss(run: Run) -> float:
    """Return a run's final training loss as `nemo-upcycle compare` does; the run has losses."""
    return final([loss for _, loss in sorted(run.scalars[TRAIN_LOSS].items())])


def rate_figure(axis: Axis, runs: Mapping[str, Run]) -> Figure:
    """Return the learning rates."""
    series = _of_each(axis, runs, "lr")
    if not series:
        return Figure("rate", "Learning rate", missing=no_events("lr"))
    peaks = (
        f"{each['name']} peaks at {_text(max(y for _, y in each['points']))}" for each in series
    )
    return lines("rate", "Learning rate", f"{'; '.join(peaks)}.", axis, "learning rate", series)


def speed_figure(axis: Axis, runs: Mapping[str, Run]) -> Figure:
    """Return the model-FLOPs utilization; TFLOP/s per GPU if the GPU's peak is unknown."""
    title, by = "Model-FLOPs utilization (MFU)", "MFUCallback, which the recipes have, logs both."
    note, tag, label, factor = "", "mfu", "MFU (%)", 100.0
    if not _of_each(axis, runs, tag):
        title, tag, label, factor = "Speed", "tflops_per_gpu", "TFLOP/s per GPU", 1.0
        note = (
            " Utilization (MFU) is not logged, because this device's peak is unknown: "
            "MFUCallback(peak_tflops=…) gives the peak."
        )
    series = _of_each(axis, runs, tag, factor)
    if not series:
        return Figure("speed", "Model-FLOPs utilization (MFU)", missing=no_events("mfu", by))
    medians = (
        f"{each['name']} {statistics.median(y for _, y in each['points']):.3g}" for each in series
    )
    drawn = [
        one
        for each in series
        for one in (
            {**each, "points": smoothed(each["points"])},
            {**each, "name": "", "style": "faint"},
        )
    ]
    caption = f"Median, in {label.replace('MFU (%)', '% MFU')}: {'; '.join(medians)}.{note}"
    return lines("speed", title, caption, axis, label, drawn)


def no_events(tag: str, by: str = "NeMo logs it.") -> str:
    """Return what would record a number."""
    return (
        f"No TensorBoard event files of this run have {tag}. {by} Event files are looked for below "
        "the run's directory, and in tb_logs/ beside it."
    )


def lines(
    name: str,
    title: str,
    caption: str,
    axis: Axis,
    label: str,
    series: Sequence[Mapping[str, Any]],
    **more: Any,
) -> Figure:
    """Return a figure of curves, with a table of their named curves."""
    chart = {"kind": "lines", "x": axis.label, "y": label, "series": series, **more}
    return Figure(name, title, caption, chart, table=_table(axis, label, series))


def line(name: str, role: str, points: Sequence[Point], style: str = "line") -> dict[str, Any]:
    """Return a curve: its name in the legend, whose it is, its points and its style."""
    return {"name": name, "role": role, "style": style, "points": points}


def smoothed(curve: Sequence[Point]) -> list[Point]:
    """Return the curve's centered moving average over 5% of its points."""
    width = max(1, round(len(curve) * _SMOOTHING_FRACTION))
    values = smooth([y for _, y in curve], width)
    return [(x, y) for (x, _), y in zip(curve, values, strict=True)]


def _of_each(
    axis: Axis, runs: Mapping[str, Run], tag: str, factor: float = 1.0
) -> list[dict[str, Any]]:
    found = []
    for role, run in runs.items():
        if curve := axis.curve(run, tag):
            found.append(line(run.name, role, [(x, factor * y) for x, y in curve]))
    return found


def _table(axis: Axis, label: str, series: Sequence[Mapping[str, Any]]) -> Table:
    """Return some points of the named curves, one row per position of the longest curve."""
    named = [each for each in series if each["name"]]
    longest = max(named, key=lambda each: len(each["points"]))["points"]
    last = len(longest) - 1
    chosen = sorted({round(i * last / (ROWS - 1)) for i in range(ROWS)}) if last else [0]
    rows = []
    for x in (longest[index][0] for index in chosen):
        near = [min(each["points"], key=lambda point: abs(point[0] - x))[1] for each in named]
        rows.append([f"{x:,.0f}", *map(_text, near)])
    return Table([axis.label, *(f"{each['name']}: {label}" for each in named)], rows)


def _text(value: float) -> str:
    return f"{value:.4g}"

"""A picture with one panel per study: differences of final losses from the first arm's."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_upcycle.ablations.report import Report, StudyReport
from nemo_upcycle.ablations.tables import counted
from nemo_upcycle.pictures import BLUE, VERMILLION, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 2
_BASELINE, _ARM = BLUE, VERMILLION

LINEAR = 0.02
"""Half-width of the linear range of an axis, in nats per token.

If an arm's difference is ten times larger, the axis is logarithmic beyond this range.
"""


def draw(report: Report, path: Path) -> None:
    """Draw the picture and write a PNG file.

    Args:
        report: The results.
        path: Path of the PNG file.

    Raises:
        UpcyclingError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # no pyplot: no window, no global state

    rows = -(-len(report.studies) // COLUMNS)
    heights = [
        max(len(one.rows) for one in report.studies[at : at + COLUMNS]) + 1.6
        for at in range(0, len(report.studies), COLUMNS)
    ]
    columns = min(COLUMNS, len(report.studies))
    figure = Figure(figsize=(6.4 * columns, 0.42 * sum(heights) + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    for axes, one in zip(panels.flat, report.studies, strict=False):
        _draw(axes, one)
    for axes in panels.flat[len(report.studies) :]:
        axes.axis("off")
    seeds = counted(report.seeds, "seed")
    figure.suptitle(
        f"Held-out loss after {report.steps} steps, less the first arm's (nats per token; left is "
        f"better)\nmean ± standard error over {seeds}, each seed a faint dot",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)


def _draw(axes: "Axes", one: StudyReport) -> None:
    places = range(len(one.rows))
    for place, row in zip(places, one.rows, strict=True):
        color = _BASELINE if place == 0 else _ARM
        if place:
            axes.plot(
                row.differences, _spread(place, len(row.differences)), "o", ms=4, color=color,
                alpha=0.3, mec="none",
            )  # fmt: skip
        axes.errorbar(
            row.difference.mean, place, xerr=row.difference.error or 0, fmt="o", ms=6, color=color,
            capsize=3, lw=1.5,
        )  # fmt: skip
    farthest = max(abs(value) for row in one.rows for value in row.differences)
    if farthest > 10 * LINEAR:
        axes.set_xscale("symlog", linthresh=LINEAR, linscale=0.8, subs=range(2, 10))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(f"logarithmic beyond ±{LINEAR:g}", fontsize=7, loc="right", labelpad=0)
    axes.axvline(0, color=_BASELINE, lw=1, alpha=0.5, zorder=0)
    axes.set_yticks(places, [f"{row.arm.label}\n{row.end.mean:.3f}" for row in one.rows])
    axes.tick_params(labelsize=8)
    axes.set_ylim(len(one.rows) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.set_title(one.study.name.replace("_", " "), loc="left", fontweight="bold", fontsize=10)
    axes.grid(axis="x", alpha=0.25, lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _spread(place: int, count: int) -> Sequence[float]:
    """Return slightly shifted vertical positions, so that no dot hides another."""
    return [place + 0.12 * (number - (count - 1) / 2) for number in range(count)]

"""Read loss curves from NeMo runs and compare a dense run with its upcycled MoE."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_upcycle.errors import UpcyclingError, listing
from nemo_upcycle.evaluation.events import event_files, read_scalars
from nemo_upcycle.files import scratch_directory
from nemo_upcycle.pictures import BLUE, VERMILLION, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

TRAIN_LOSS = "reduced_train_loss"
VAL_LOSS = "val_loss"

_FINAL_FRACTION = 0.1
_SMOOTHING_FRACTION = 0.05
_DENSE_COLOR, _MOE_COLOR = BLUE, VERMILLION


@dataclass(frozen=True)
class Curve:
    """The losses of a run, in nats per token, by step (counted from 0).

    Attributes:
        name: Name of the run in tables and pictures.
        steps: Optimizer steps with a training loss, increasing.
        loss: Training loss per step, before the step's update.
        val_steps: Steps with a validation loss, increasing; empty without validation.
        val_loss: Validation loss per step in `val_steps`.
    """

    name: str
    steps: tuple[int, ...]
    loss: tuple[float, ...]
    val_steps: tuple[int, ...] = ()
    val_loss: tuple[float, ...] = ()

    @property
    def final_loss(self) -> float:
        """Mean training loss of the last 10% of the logged steps, at least one."""
        return final(self.loss)

    @property
    def final_val_loss(self) -> float | None:
        """Last validation loss; None without validation."""
        return self.val_loss[-1] if self.val_loss else None


@dataclass(frozen=True)
class Comparison:
    """A dense run and its upcycled MoE, trained on the same data in the same order.

    Attributes:
        dense: Curve of the dense run.
        moe: Curve of the MoE run, starting at the same step as the dense run.
        tokens_per_step: Global batch size times sequence length, in tokens.
        markdown: Path of the table, a markdown file.
        picture: Path of the picture, a PNG file.
    """

    dense: Curve
    moe: Curve
    tokens_per_step: int
    markdown: Path
    picture: Path

    @property
    def first_step_difference(self) -> float:
        """Absolute difference of the losses at the first step, in nats per token.

        TensorBoard keeps losses in single precision: near 4, differences below 2e-7 are lost.
        """
        return abs(self.moe.loss[0] - self.dense.loss[0])


def read_curve(run_dir: Path, metric: str = TRAIN_LOSS, *, name: str | None = None) -> Curve:
    """Read a run's training and validation losses from TensorBoard event files.

    All event files below the directory belong to the run. A resumed run has several files; where
    files contain the same step, the value written last counts.

    Args:
        run_dir: Directory of the run.
        metric: Tag of the training loss.
        name: Name of the curve; None means the name of the directory.

    Raises:
        UpcyclingError: There are no event files below the directory, or none has the metric.
    """
    files = event_files(run_dir)
    if not files:
        raise UpcyclingError(
            f"no TensorBoard event files (*tfevents*) below {run_dir}; give the log directory of "
            "a run that has TensorBoard logging on"
        )
    tags = read_scalars(files)
    if metric not in tags:
        raise UpcyclingError(
            f"no {metric} in the event files below {run_dir}; they have: "
            f"{listing(list(tags)) or 'no scalars at all'}"
        )
    steps, loss = _columns(tags[metric])
    val_steps, val_loss = _columns(tags.get(VAL_LOSS, {}))
    return Curve(run_dir.name if name is None else name, steps, loss, val_steps, val_loss)


def compare_runs(
    dense: Path,
    moe: Path,
    out: Path,
    *,
    tokens_per_step: int,
    metric: str = TRAIN_LOSS,
    names: tuple[str, str] = ("dense", "MoE"),
    title: str = "Continued training: dense and upcycled MoE",
) -> Comparison:
    """Compare two runs and write `comparison.md` and `comparison.png`.

    Args:
        dense: Directory of the dense run.
        moe: Directory of the MoE run, on the same data in the same order.
        out: Output directory, created if missing.
        tokens_per_step: Global batch size times sequence length, in tokens.
        metric: Tag of the training loss.
        names: Names of the dense and the MoE run in table and picture.
        title: Title of the picture and the table.

    Raises:
        UpcyclingError: matplotlib is missing, a run has no such metric, the runs start at different
            steps, or tokens_per_step is not positive.
    """
    require_matplotlib()
    if tokens_per_step < 1:
        raise UpcyclingError(
            f"tokens_per_step is {tokens_per_step}; expected the positive product of global batch "
            "size and sequence length"
        )
    curves = read_curve(dense, metric, name=names[0]), read_curve(moe, metric, name=names[1])
    _check_same_start(*curves, dense, moe)
    markdown, picture = out / "comparison.md", out / "comparison.png"
    comparison = Comparison(*curves, tokens_per_step, markdown, picture)
    with scratch_directory(out, "comparison") as temporary:
        new = temporary / "new.md", temporary / "new.png"
        new[0].write_text(_markdown(comparison, title), encoding="utf-8")
        plot(comparison, title).savefig(new[1], dpi=150)
        os.replace(new[0], markdown)
        os.replace(new[1], picture)
    return comparison


def render(comparison: Comparison, title: str | None = None) -> Table:
    """Return the comparison as a table for the terminal, to be shown by `rich.print`."""
    from rich.table import Table

    header, *rows = _rows(comparison)
    table = Table(title=title)
    table.add_column(header[0])
    for column in header[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def plot(comparison: Comparison, title: str) -> Figure:
    """Return a figure with the losses of both runs over the tokens and the step-0 equality.

    Raises:
        UpcyclingError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # no pyplot: no window, no global state
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.add_subplot()
    for curve, color in ((comparison.dense, _DENSE_COLOR), (comparison.moe, _MOE_COLOR)):
        _plot_curve(axes, curve, comparison.tokens_per_step, color)
    _mark_first_step(axes, comparison)
    axes.set_title(title, loc="left", fontweight="bold", pad=12)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False)
    return figure


def final(losses: Sequence[float]) -> float:
    """Return the mean of the last 10% of the losses, at least one."""
    last = losses[-max(1, round(len(losses) * _FINAL_FRACTION)) :]
    return math.fsum(last) / len(last)


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Return the centered moving average of up to `width` values.

    At the start the window narrows symmetrically, so the first value, the step-0 loss, is kept.
    At the end the window is truncated, so that one noisy last value does not bend the curve.
    """
    half = width // 2
    smoothed = []
    for i in range(len(values)):
        reach = min(half, i)
        window = values[i - reach : i + reach + 1]
        smoothed.append(math.fsum(window) / len(window))
    return smoothed


def _columns(series: dict[int, float]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the sorted steps and their values."""
    steps = tuple(sorted(series))
    return steps, tuple(series[step] for step in steps)


def _check_same_start(dense: Curve, moe: Curve, dense_dir: Path, moe_dir: Path) -> None:
    """Check that both runs' first losses are from the same step and thus from the same data.

    Raises:
        UpcyclingError: The steps differ.
    """
    if dense.steps[0] != moe.steps[0]:
        raise UpcyclingError(
            f"the first loss below {dense_dir} is of step {dense.steps[0]}, below {moe_dir} of "
            f"step {moe.steps[0]}: they cannot be compared; train both from the same step with "
            "log_every_n_steps=1"
        )


def _tokens(steps: Sequence[int], tokens_per_step: int) -> list[int]:
    """Return the number of tokens seen up to and including each step.

    Computed from the step, because NeMo logs consumed_samples late or not at all.
    """
    return [(step + 1) * tokens_per_step for step in steps]


def _rows(comparison: Comparison) -> Iterator[tuple[str, str, str, str]]:
    """Yield the table's header and rows: quantity, dense, MoE, difference."""
    dense, moe = comparison.dense, comparison.moe
    yield "", dense.name, moe.name, "difference"
    yield (
        f"first training loss (step {dense.steps[0]})",
        f"{dense.loss[0]:.6f}",
        f"{moe.loss[0]:.6f}",
        f"{_small(comparison.first_step_difference)} (absolute)",
    )
    yield _loss_row("final training loss (mean of last 10%)", dense.final_loss, moe.final_loss)
    if dense.final_val_loss is not None or moe.final_val_loss is not None:
        yield _loss_row("final validation loss", dense.final_val_loss, moe.final_val_loss)
    tokens = [_tokens(curve.steps, comparison.tokens_per_step)[-1] for curve in (dense, moe)]
    yield "training tokens", f"{tokens[0]:,}", f"{tokens[1]:,}", f"{tokens[1] - tokens[0]:+,}"


def _loss_row(quantity: str, dense: float | None, moe: float | None) -> tuple[str, str, str, str]:
    """Return a table row of two losses; a missing loss is shown as n/a."""
    cells = ["n/a" if loss is None else f"{loss:.4f}" for loss in (dense, moe)]
    difference = "n/a" if dense is None or moe is None else f"{moe - dense:+.4f}"
    return quantity, cells[0], cells[1], difference


def _small(difference: float) -> str:
    """Format a difference that may be tiny; 0 if there is none."""
    return f"{difference:.1e}" if difference else "0"


def _markdown(comparison: Comparison, title: str) -> str:
    """Return the table as a markdown document."""
    header, *rows = [
        "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"
        for row in _rows(comparison)
    ]
    note = (
        "Losses in nats per token; differences are "
        f"{comparison.moe.name} minus {comparison.dense.name} unless marked absolute."
    )
    picture = f"![{title}]({comparison.picture.name})"
    table = "\n".join([header, "|:---|---:|---:|---:|", *rows])
    return f"# {title}\n\n{table}\n\n{note}\n\n{picture}\n"


def _plot_curve(axes: Axes, curve: Curve, tokens_per_step: int, color: str) -> None:
    """Draw a run: training loss faint and smoothed, validation loss dashed with dots."""
    tokens = _tokens(curve.steps, tokens_per_step)
    width = max(1, round(len(curve.loss) * _SMOOTHING_FRACTION))
    axes.plot(tokens, curve.loss, color=color, alpha=0.25, linewidth=1)
    axes.plot(
        tokens,
        smooth(curve.loss, width),
        color=color,
        linewidth=2,
        label=f"{curve.name}, training (final {curve.final_loss:.3f})",
    )
    if curve.final_val_loss is not None:
        axes.plot(
            _tokens(curve.val_steps, tokens_per_step),
            curve.val_loss,
            color=color,
            linestyle="--",
            linewidth=1.2,
            marker="o",
            markersize=4,
            label=f"{curve.name}, validation (final {curve.final_val_loss:.3f})",
        )


def _mark_first_step(axes: Axes, comparison: Comparison) -> None:
    """Mark the first losses and annotate both values and the difference above the curves."""
    dense, moe = comparison.dense, comparison.moe
    x = _tokens(dense.steps[:1], comparison.tokens_per_step)[0]
    # A ring around a dot: both stay visible where the losses are equal.
    axes.plot(x, dense.loss[0], "o", ms=12, mfc="none", mec=_DENSE_COLOR, mew=2, clip_on=False)
    axes.plot(x, moe.loss[0], "o", ms=5, color=_MOE_COLOR, clip_on=False)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.35 * (high - low))  # room for the annotation and the legend
    axes.annotate(
        f"at step {dense.steps[0]}\n"
        f"{dense.name} {dense.loss[0]:.6f}\n"
        f"{moe.name} {moe.loss[0]:.6f}\n"
        f"absolute difference {_small(comparison.first_step_difference)}",
        xy=(x, moe.loss[0]),
        xytext=(0.06, 0.97),
        textcoords="axes fraction",
        verticalalignment="top",
        bbox={"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": "0.7"},
        arrowprops={"arrowstyle": "-", "color": "0.5", "shrinkB": 8},
    )

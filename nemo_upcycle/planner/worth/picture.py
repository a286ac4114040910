"""A figure: predicted loss over GPU-hours, and the law's own models beside it."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.pictures import BLUE, GREEN, VERMILLION, require_matplotlib, write_picture
from nemo_upcycle.planner.worth.comparison import (
    SAME_COST,
    SAME_TOKENS,
    SCRATCH,
    UPCYCLE,
    Worth,
    hours_per_token,
)
from nemo_upcycle.planner.worth.law import (
    LEAST_TOKENS,
    MOST_TOKENS,
    Interval,
    dense_loss,
    scratch_loss,
    upcycled_loss,
)
from nemo_upcycle.planner.worth.published import TABLE_7, TABLE_7_PARAMETERS
from nemo_upcycle.planner.worth.scope import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Callable[[float], Interval]
"""Loss over tokens from now on."""

POINTS = 200


def draw(found: Worth, title: str, path: Path) -> None:
    """Write a figure: loss over GPU-hours of the three ways, and the paper's own models.

    Args:
        found: The comparison.
        title: Title of the figure.
        path: The file to write (.png, .svg, .pdf).

    Raises:
        UpcyclingError: matplotlib is not installed, or no loss is predicted.
    """
    if not found.has_losses:
        raise UpcyclingError(
            f"{path} was not drawn: no loss is predicted outside of the law's range "
            f"({found.outside[0]}). --extrapolate draws the law's numbers all the same."
        )
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for axes in (left, right):
        axes.set_xscale("log")  # before the second axis and its labels
    _asked(left, found)
    _papers_own(right)
    for axes in (left, right):
        axes.set_ylabel("predicted loss, nats per token")
        axes.grid(alpha=0.25)
        axes.spines["right"].set_visible(False)
        axes.legend(fontsize=9, loc="upper right")
    mark = " · EXTRAPOLATED: outside of the law's range" if found.extrapolated else ""
    figure.suptitle(
        f"{title}, after {short(found.dense_tokens)} tokens{mark}\nlaw of arXiv 2502.03009, "
        "Table 2, as printed; bands: what the rounding of the printed numbers alone allows"
    )
    write_picture(figure, path, dpi=100)


def _asked(axes: "Axes", found: Worth) -> None:
    moe, dense = hours_per_token(found.moe), hours_per_token(found.dense)
    most = max(MOST_TOKENS, 4 * found.tokens) if found.extrapolated else MOST_TOKENS
    n1, d1 = found.parameters, found.dense_tokens
    every = _tokens(most)
    on = every if found.extrapolated else _tokens(MOST_TOKENS - d1)
    curves: tuple[tuple[str, str, Sequence[float], float, Curve], ...] = (
        ("upcycle", VERMILLION, every, moe, partial(upcycled_loss, n1, d1)),
        ("dense, trained on", BLUE, on, dense, lambda tokens: dense_loss(n1, d1 + tokens)),
        ("MoE from scratch", GREEN, every, moe, partial(scratch_loss, n1)),
    )
    style = "--" if found.extrapolated else "-"
    for name, color, tokens, rate, curve in curves:
        if tokens:
            _plot(axes, [rate * one for one in tokens], list(map(curve, tokens)), name, color,
                  style)  # fmt: skip
    axes.set_xlim(dense * LEAST_TOKENS, 1.3 * moe * most)
    _marks(axes, found, moe, most)
    axes.set_xlabel("GPU-hours from now on")

    def tokens_of(hours: Any) -> Any:
        return hours / moe

    def hours_of(tokens: Any) -> Any:
        return tokens * moe

    top = axes.secondary_xaxis("top", functions=(tokens_of, hours_of))
    top.set_xlabel("tokens of the MoE")
    top.xaxis.set_major_formatter(lambda value, _: short(value))


def _marks(axes: "Axes", found: Worth, moe: float, most: float) -> None:
    """Mark what was asked, the dense model now, the break-even and the end of the range."""
    now, even = found.dense_now, found.break_even
    if now is not None:
        axes.axhline(now.value, color="0.4", lw=1, ls=":")
        axes.annotate("the dense model now", (0.01, now.value), xytext=(0, 3),
                      xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=9,
                      color="0.3")  # fmt: skip
    colors = {UPCYCLE: VERMILLION, SAME_TOKENS: BLUE, SAME_COST: BLUE, SCRATCH: GREEN}
    for name, way in found.ways.items():
        if way.loss and way.gpu_hours and way.gpu_hours.value <= moe * most:
            axes.plot(way.gpu_hours.value, way.loss.value, "o", ms=8, mec="black",
                      color=colors[name], zorder=3)  # fmt: skip
    if even is not None and even.low < most:
        axes.axvspan(moe * even.low, moe * min(even.high, most), color="0.5", alpha=0.1, lw=0,
                     label="break-even that rounding allows")  # fmt: skip
        if even.value < most:
            axes.axvline(moe * even.value, color="0.3", lw=1.2, ls="--",
                         label=f"break-even: {short(even.value)} tokens")  # fmt: skip
    axes.axvline(moe * MOST_TOKENS, color="black", lw=1.5, label=f"end of the range: "
                 f"{short(MOST_TOKENS)} tokens")  # fmt: skip


def _papers_own(axes: "Axes") -> None:
    """Draw the law for the paper's 1B model, with the models of its Table 7."""
    n1, (before, after) = TABLE_7_PARAMETERS, TABLE_7.values()
    d1, d2 = before["tokens"], after["tokens"]
    every = _tokens(MOST_TOKENS)
    curves: tuple[tuple[str, str, Curve], ...] = (
        (f"upcycled after {short(d1)}", VERMILLION, partial(upcycled_loss, n1, d1)),
        ("dense", BLUE, partial(dense_loss, n1)),
        ("MoE from scratch", GREEN, partial(scratch_loss, n1)),
    )
    for name, color, curve in curves:
        _plot(axes, every, list(map(curve, every)), name, color)
    points = (
        (d1, dense_loss(n1, d1).value, before["accuracy"], BLUE, (8, 14)),
        (d2, upcycled_loss(n1, d1, d2).value, after["accuracy"], VERMILLION, (-60, -34)),
    )
    for tokens, loss, accuracy, color, offset in points:
        axes.plot(tokens, loss, "o", ms=8, mec="black", color=color, zorder=3)
        axes.annotate(f"measured: mean\naccuracy {accuracy}%", (tokens, loss), xytext=offset,
                      textcoords="offset points", fontsize=9, color=color)  # fmt: skip
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.set_title("the paper's own 1B model and 8x1B MoE (its Table 7)", fontsize=10)


def _plot(
    axes: "Axes",
    places: Sequence[float],
    losses: Sequence[Interval],
    name: str,
    color: str,
    style: str = "-",
) -> None:
    low, value, high = zip(*losses, strict=True)
    axes.plot(places, value, style, color=color, lw=2, label=name)
    axes.fill_between(places, low, high, color=color, alpha=0.12, lw=0)


def _tokens(most: float) -> list[float]:
    """Return numbers of tokens up to the most, evenly spaced on a logarithmic axis."""
    if most < LEAST_TOKENS:
        return []
    ratio = most / LEAST_TOKENS
    return [LEAST_TOKENS * ratio ** (place / (POINTS - 1)) for place in range(POINTS)]

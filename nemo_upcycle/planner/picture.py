"""A figure of how a job scales."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.pictures import require_matplotlib, write_picture
from nemo_upcycle.planner.report import WHERE, seconds
from nemo_upcycle.planner.scaling import Point
from nemo_upcycle.planner.search import HEADROOM, Prediction
from nemo_upcycle.planner.tuning import COMPONENTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GIB = 2**30
Found = Mapping[int, Prediction]
"""The best mapping at each position on the axis."""


def draw_scaling(points: Sequence[Point], title: str, path: Path) -> None:
    """Write a figure: step time, MFU, memory, and the time to load and upcycle over GPUs.

    Args:
        points: Jobs of several sizes.
        title: Title of the figure.
        path: The file to write (.png, .svg, .pdf).

    Raises:
        UpcyclingError: matplotlib is not installed, or no job fits.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    best = {place: point.best for place, point in enumerate(points) if point.best is not None}
    if not best:
        raise UpcyclingError("No mapping fits on any of these numbers of GPUs; nothing to draw.")
    figure = Figure(figsize=(15, 9.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    (step, use), (loading, memory) = panels
    _step_times(step, best)
    _utilization(use, best)
    _memory(memory, best)
    loads = {n: point.loading for n, point in enumerate(points) if point.loading}
    loading.plot(list(loads), [one.seconds for one in loads.values()], marker="o", label="default")
    once = [one.seconds_once for one in loads.values()]
    loading.plot(list(loads), once, marker="s", label="read_once, not measured on GPUs")
    loading.set_ylim(bottom=0)
    loading.legend()
    loading.set_title("read the dense checkpoint and fill the MoE, s")
    for axes in panels.flat:
        axes.set_xticks(range(len(points)), [str(point.gpus) for point in points])
        axes.set_xlim(-0.6, len(points) - 0.4)
        axes.set_xlabel("GPUs")
        axes.grid(axis="y", alpha=0.3)
        for place in set(range(len(points))) - set(best):
            axes.axvspan(place - 0.4, place + 0.4, color="0.93")
            axes.text(place, 0.5, "does not fit", rotation=90, ha="center", va="center",
                      color="0.4", transform=axes.get_xaxis_transform())  # fmt: skip
    figure.suptitle(title)
    write_picture(figure, path, dpi=100)


def _step_times(axes: "Axes", points: Found) -> None:
    places, best = list(points), list(points.values())
    total, gpus = [one.time.total for one in best], [one.mapping.world_size for one in best]
    axes.plot(places, total, marker="o", label="predicted")
    ideal = [total[0] * gpus[0] / number for number in gpus]
    axes.plot(places, ideal, linestyle="--", color="0.6", label=f"as on {gpus[0]}, divided")
    for place, value in zip(places, total, strict=True):
        axes.annotate(seconds(value), (place, value), xytext=(0, 6), ha="center",
                      textcoords="offset points")  # fmt: skip
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low, 1.4 * high)  # room for the labels
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.set_title("step time, s; constant global batch")
    axes.legend()


def _utilization(axes: "Axes", best: Found) -> None:
    """Stack the parts of the step time, with MFU on top."""
    shares = {
        words: [100 * getattr(one.time, name) / one.time.total for one in best.values()]
        for name, words in COMPONENTS.items()
    }
    _stack(axes, best, shares)
    used = [100 * one.mfu for one in best.values()]
    axes.plot(list(best), used, marker="o", color="black", label="MFU, causal attention")
    for place, value in zip(best, used, strict=True):
        axes.annotate(f"{value:.0f}", (place, value), xytext=(0, 6), ha="center",
                      textcoords="offset points")  # fmt: skip
    axes.set_ylim(0, 100)
    axes.set_title("parts of the step time, and MFU, %")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _memory(axes: "Axes", best: Found) -> None:
    gib = {
        words: [getattr(one.memory, name) / GIB for one in best.values()]
        for name, words in WHERE.items()
    }
    _stack(axes, best, gib)
    limit = next(iter(best.values())).hardware.memory_gib * HEADROOM
    axes.axhline(limit, color="black", linestyle="--", label=f"{HEADROOM:.0%} of a GPU")
    for place, one in best.items():
        axes.text(place, limit * 0.03, f"{one.mapping.folding}\n{one.mapping.recompute}",
                  fontsize=7, rotation=90, ha="center", va="bottom")  # fmt: skip
    axes.set_title("memory of the fullest GPU, GiB; its mapping and recompute")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _stack(axes: "Axes", best: Found, parts: Mapping[str, list[float]]) -> None:
    from matplotlib import colormaps

    bottom = [0.0] * len(best)
    for number, (name, values) in enumerate(parts.items()):
        color = colormaps["Set3"](number)
        axes.bar(list(best), values, 0.7, bottom=bottom, label=name, color=color)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]

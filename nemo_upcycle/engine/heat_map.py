"""A figure of the load of every expert over a run."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nemo_upcycle.engine.load_record import Loads, thinned
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.pictures import require_matplotlib, write_picture

SNAPSHOTS = 400
"""Maximum number of measurements that are drawn."""


def grid(loads: Sequence[Loads]) -> np.ndarray:
    """Return loads relative to an even load, [MoE layers, experts, steps]."""
    return np.stack([list(each.relative.values()) for each in loads], axis=-1)


def draw(loads: Sequence[Loads], path: Path) -> None:
    """Write a figure: layers with their experts from top to bottom, steps to the right.

    Does nothing without a measurement; prints a remark without matplotlib.

    Args:
        loads: The measurements, in order.
        path: The file to write.
    """
    if not loads:
        return
    try:
        require_matplotlib()
    except UpcyclingError as error:  # a finished training must not fail because of a figure
        warnings.warn(str(error), stacklevel=2)
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    drawn = thinned(loads, SNAPSHOTS)
    values = grid(drawn)
    layers, experts, _ = values.shape
    figure = Figure(figsize=(9, min(24.0, 1.5 + 0.06 * layers * experts + 1)), layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(
        values.reshape(layers * experts, -1).clip(min=0.01),
        aspect="auto",
        interpolation="nearest",
        cmap="RdBu_r",
        norm=LogNorm(vmin=0.1, vmax=10),
        extent=(drawn[0].step, drawn[-1].step + 1, layers * experts, 0),
    )
    for layer in range(1, layers):
        axes.axhline(layer * experts, color="black", linewidth=0.5)
    middles = [(layer + 0.5) * experts for layer in range(layers)]
    axes.set_yticks(middles, [f"MoE layer {layer}" for layer in range(layers)])
    axes.set_xlabel("step")
    axes.set_title(f"Load of {experts} experts in each of {layers} MoE layers")
    bar = figure.colorbar(image, ax=axes, ticks=[0.1, 0.3, 1, 3, 10])
    bar.ax.set_yticklabels(["0.1 ×", "0.3 ×", "even", "3 ×", "10 ×"])
    write_picture(figure, path, dpi=120)

"""A figure of the load of every expert over a run."""

import warnings
from pathlib import Path

import torch

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.pictures import require_matplotlib, write_picture

SNAPSHOTS = 400
"""Maximum number of snapshots; beyond it every second one is dropped, and half as many added."""


class LoadHistory:
    """Snapshots of the load of all experts."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._loads: list[torch.Tensor] = []
        self._every, self._count = 1, 0

    def add(self, step: int, load: torch.Tensor) -> None:
        """Keep a snapshot.

        Args:
            step: The training step.
            load: Each expert's share of the assignments, [layers, experts]; NaN in layers without
                experts.
        """
        if self._count % self._every == 0:
            self.steps.append(step)
            self._loads.append(load.cpu())
        self._count += 1
        if len(self.steps) > SNAPSHOTS:
            self.steps, self._loads = self.steps[::2], self._loads[::2]
            self._every *= 2

    def grid(self) -> torch.Tensor:
        """Return loads relative to an even load, [MoE layers, experts, steps]."""
        loads = torch.stack(self._loads, dim=-1)
        is_moe = ~torch.isnan(loads[:, 0, 0])
        return loads[is_moe] * loads.shape[1]

    def draw(self, path: Path) -> None:
        """Write a figure: layers with their experts from top to bottom, steps to the right.

        Does nothing without a snapshot; prints a remark without matplotlib.
        """
        if not self.steps:
            return
        try:
            require_matplotlib()
        except UpcyclingError as error:  # a finished training must not fail because of a figure
            warnings.warn(str(error), stacklevel=2)
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure

        grid = self.grid()
        layers, experts, _ = grid.shape
        figure = Figure(figsize=(9, min(24.0, 1.5 + 0.06 * layers * experts + 1)), layout="tight")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        image = axes.imshow(
            grid.reshape(layers * experts, -1).clamp(min=0.01),
            aspect="auto",
            interpolation="nearest",
            cmap="RdBu_r",
            norm=LogNorm(vmin=0.1, vmax=10),
            extent=(self.steps[0], self.steps[-1] + 1, layers * experts, 0),
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

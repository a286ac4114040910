"""The process groups of a folding as a table and as a figure."""

from colorsys import hsv_to_rgb
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.pictures import require_matplotlib, write_picture
from nemo_upcycle.plans.groups import ATTENTION, EXPERTS, PURPOSES, rank_groups
from nemo_upcycle.plans.layout import coordinates

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRAWN_NODES = 16
NAMED_COLORS = 64
"""The most colors that the legend names; the text of each rank says the same."""

COPIES = ("dp", "edp", "cp")
"""Axes along which ranks hold the same parameters."""
COLUMNS = ("groups", "of ranks", "the first", "where", "for")


def render(folding: ParallelFolding, world_size: int, gpus_per_node: int) -> Table:
    """Return a table of all groups of more than one rank.

    Args:
        folding: The parallel mapping.
        world_size: Ranks of the job.
        gpus_per_node: Ranks of a node.
    """
    table = Table(title=f"{world_size} ranks, {gpus_per_node} per node", title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="right" if name == "of ranks" else "left")
    for row in rows(folding, world_size, gpus_per_node):
        table.add_row(*row)
    return table


def rows(folding: ParallelFolding, world_size: int, gpus_per_node: int) -> list[tuple[str, ...]]:
    """Return the table's rows, one per kind of groups of more than one rank; see `render`."""
    found: list[tuple[str, ...]] = []
    for kind, groups in rank_groups(folding, world_size).items():
        if groups.size == 1:
            continue
        nodes = groups.nodes(gpus_per_node)
        found.append(
            (
                f"{len(groups.ranks)} × {kind}",
                str(groups.size),
                _ranks(groups.ranks[0]),
                "inside a node" if nodes == 1 else f"over {nodes} nodes",
                PURPOSES[kind],
            )
        )
    return found


def _ranks(ranks: tuple[int, ...]) -> str:
    """Write ranks in short form: 0–7, or 0, 16, 32 … 112."""
    steps = {b - a for a, b in pairwise(ranks)}
    if steps == {1}:
        return f"{ranks[0]}–{ranks[-1]}"
    if len(ranks) <= 4:
        return ", ".join(map(str, ranks))
    return f"{ranks[0]}, {ranks[1]}, {ranks[2]} … {ranks[-1]}"


def draw(folding: ParallelFolding, world_size: int, gpus_per_node: int, path: Path) -> None:
    """Write a figure of the ranks on their nodes, once for attention and once for experts.

    Colors show what a rank holds: the pipeline stage and tensor-parallel part in attention, the
    stage and experts in MoE layers. No two have the same color. Frames show the groups that
    communicate most: TP and ETP·EP.

    Args:
        folding: The parallel mapping.
        world_size: Ranks of the job. With more than 16 nodes, only the first nodes per stage are
            drawn.
        gpus_per_node: Ranks per node.
        path: The file to write.

    Raises:
        UpcyclingError: matplotlib is not installed, or the world size does not divide.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    nodes = drawn_nodes(folding, world_size, gpus_per_node)
    columns = min(gpus_per_node, world_size)
    size = max(9, 2.4 * columns), 3.2 + 0.85 * len(nodes)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, names in zip(figure.subplots(1, 2), (ATTENTION, EXPERTS), strict=True):
        _panel(axes, folding, world_size, gpus_per_node, nodes, names)
    every = -(-world_size // gpus_per_node)
    more = f", the first {len(nodes)} of {every} nodes by stage" if len(nodes) < every else ""
    figure.suptitle(f"{folding}: {world_size} ranks on nodes of {gpus_per_node}{more}")
    write_picture(figure, path, dpi=110)


def drawn_nodes(folding: ParallelFolding, world_size: int, gpus_per_node: int) -> list[int]:
    """Return the nodes to draw: all, or the first nodes of each stage.

    Args:
        folding: The parallel mapping.
        world_size: Ranks of the job.
        gpus_per_node: Ranks of a node.
    """
    nodes = range(-(-world_size // gpus_per_node))
    if len(nodes) <= DRAWN_NODES:
        return list(nodes)
    stages = folding.pipeline_model_parallel_size
    ranks_of_stage, each = world_size // stages, max(1, DRAWN_NODES // stages)
    firsts = [stage * ranks_of_stage // gpus_per_node for stage in range(stages)]
    chosen = {node for first in firsts for node in nodes[first : first + each]}
    return sorted(chosen)[:DRAWN_NODES]


@dataclass(frozen=True)
class Seat:
    """A rank in the figure.

    Attributes:
        rank: The global rank.
        gpu: Column: the rank's number on the node.
        row: Row: the index of the drawn node.
        place: Coordinates by axis.
        held: Number of what the rank holds; ranks with copies have the same.
    """

    rank: int
    gpu: int
    row: int
    place: dict[str, int]
    held: int


def seats(
    folding: ParallelFolding,
    world_size: int,
    gpus_per_node: int,
    nodes: list[int],
    names: tuple[str, ...],
) -> list[Seat]:
    """Return the ranks of the drawn nodes.

    Args:
        folding: The parallel mapping.
        world_size: Ranks of the job.
        gpus_per_node: Ranks of a node.
        nodes: The nodes to draw, from `drawn_nodes`.
        names: Axes: `ATTENTION` or `EXPERTS`.
    """
    held: dict[tuple[int, ...], int] = {}
    found = []
    for row, node in enumerate(nodes):
        for gpu in range(min(gpus_per_node, world_size - node * gpus_per_node)):
            rank = node * gpus_per_node + gpu
            at = coordinates(folding, world_size, rank)
            place = {name: getattr(at, name) for name in names}
            own = tuple(value for name, value in place.items() if name not in COPIES)
            found.append(Seat(rank, gpu, row, place, held.setdefault(own, len(held))))
    return found


def colors_of(number: int) -> list[tuple[float, float, float]]:
    """Return light colors, as many as asked for and no two alike: hues in up to three tones."""
    tones = ((0.5, 1.0), (0.2, 0.95), (0.45, 0.75)) if number > 12 else ((0.45, 1.0),)
    hues = -(-number // len(tones))
    return [
        hsv_to_rgb(n // len(tones) / hues, *tones[n % len(tones)])
        for n in range(number)
    ]  # fmt: skip


def _panel(
    axes: "Axes",
    folding: ParallelFolding,
    world_size: int,
    gpus_per_node: int,
    nodes: list[int],
    names: tuple[str, ...],
) -> None:
    from matplotlib.patches import Rectangle

    cells: dict[int, tuple[int, int]] = {}
    seated = seats(folding, world_size, gpus_per_node, nodes, names)
    colors = colors_of(1 + max(seat.held for seat in seated))
    sizes = {name: 1 + max(seat.place[name] for seat in seated) for name in names}
    legend: dict[str, Rectangle] = {}
    for seat in seated:
        cells[seat.rank] = gpu, row = seat.gpu, seat.row
        color = colors[seat.held]
        cell = Rectangle((gpu, row), 1, 1, facecolor=color, edgecolor="white")
        axes.add_patch(cell)
        words = [f"{name.upper()} {value}" for name, value in seat.place.items()]
        text = "\n".join(["  ".join(words[:2]), "  ".join(words[2:])])
        axes.text(gpu + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8)
        split = [name for name in seat.place if name not in COPIES and sizes[name] > 1]
        held = " ".join(f"{name.upper()} {seat.place[name]}" for name in reversed(split))
        legend.setdefault(held or "all", cell)
    if len(legend) <= NAMED_COLORS:
        axes.legend(
            legend.values(), legend, title="one color: the same parameters", fontsize=8,
            ncols=min(8, len(legend)), loc="upper center", bbox_to_anchor=(0.5, -0.4 / len(nodes)),
            columnspacing=1, handlelength=1.2,
        )  # fmt: skip
    inner = rank_groups(folding, world_size)["ETP·EP" if names is EXPERTS else "TP"]
    for group in inner.ranks:
        _frame(axes, [cells[rank] for rank in group if rank in cells])
    columns = min(gpus_per_node, world_size)
    axes.set_xlim(0, columns)
    axes.set_ylim(len(nodes), 0)
    gpus = range(columns)
    axes.set_xticks([gpu + 0.5 for gpu in gpus], [str(gpu) for gpu in gpus])
    axes.set_yticks([row + 0.5 for row in range(len(nodes))], [f"node {node}" for node in nodes])
    axes.set_title("MoE layers" if names is EXPERTS else "attention and dense layers")


def _frame(axes: "Axes", cells: list[tuple[int, int]]) -> None:
    """Frame a group's adjacent ranks on a node."""
    from matplotlib.patches import Rectangle

    runs: list[list[tuple[int, int]]] = []
    for gpu, row in cells:
        if runs and (gpu - 1, row) == runs[-1][-1]:
            runs[-1].append((gpu, row))
        else:
            runs.append([(gpu, row)])
    for run in runs:
        gpu, row = run[0]
        place, width = (gpu + 0.03, row + 0.05), len(run) - 0.06
        axes.add_patch(Rectangle(place, width, 0.9, fill=False, edgecolor="black", linewidth=1.5))

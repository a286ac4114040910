"""The process groups of a run's parallel mapping."""

from collections.abc import Mapping
from typing import Any

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.plans.groups import ATTENTION, EXPERTS, rank_groups
from nemo_upcycle.plans.groups_report import COLUMNS, drawn_nodes, rows, seats
from nemo_upcycle.report.figures import Figure, Table
from nemo_upcycle.report.runs import Run

TITLE = "Parallel mapping"
_PANELS = (("attention and dense layers", ATTENTION, "TP"), ("MoE layers", EXPERTS, "ETP·EP"))


def mapping_figure(run: Run) -> Figure:
    """Return the ranks on their nodes and the groups of the run's latest start."""
    mapping = run.record.get("mapping")
    if not isinstance(mapping, Mapping):
        missing = (
            "The run has recorded no mapping. A checkpoint of this version has it; "
            "nemo-upcycle groups draws the groups of a recipe."
        )
        return Figure("mapping", TITLE, missing=missing)
    sizes = dict(mapping)
    try:
        world_size, per_node = int(sizes.pop("world_size")), int(sizes.pop("ranks_per_node"))
        folding = ParallelFolding(**sizes)
        table = Table(COLUMNS, rows(folding, world_size, per_node))
        panels = _panels(folding, world_size, per_node)
    except (UpcyclingError, KeyError, TypeError, ValueError) as error:
        missing = f"The recorded mapping cannot be drawn: {error}"
        return Figure("mapping", TITLE, missing=missing)
    many = "rank" if world_size == 1 else "ranks"
    caption = f"{folding}: {world_size} {many}, {per_node} per node, at the latest start. "
    caption += "Ranks of one color hold copies of the same weights. "
    caption += "Frames: TP in attention, ETP·EP in MoE layers, which communicate most."
    nodes = drawn_nodes(folding, world_size, per_node)
    if len(nodes) * per_node < world_size:
        caption += f" Drawn: {len(nodes)} of {-(-world_size // per_node)} nodes."
    chart = {"kind": "ranks", "nodes": nodes, "per_node": per_node, "panels": panels}
    if not table.rows:
        caption += " No group has more than one rank."
    return Figure("mapping", TITLE, caption, chart, table=table if table.rows else None)


def _panels(folding: ParallelFolding, world_size: int, per_node: int) -> list[dict[str, Any]]:
    nodes, groups = drawn_nodes(folding, world_size, per_node), rank_groups(folding, world_size)
    panels = []
    for title, axes, framed in _PANELS:
        found = seats(folding, world_size, per_node, nodes, axes)
        group_of = {
            rank: index for index, group in enumerate(groups[framed].ranks) for rank in group
        }
        cells = [
            {
                "rank": seat.rank,
                "gpu": seat.gpu,
                "row": seat.row,
                "held": seat.held,
                "group": group_of[seat.rank] if groups[framed].size > 1 else None,
                "place": [f"{name.upper()} {value}" for name, value in seat.place.items()],
            }
            for seat in found
        ]
        panels.append({"title": title, "framed": framed, "cells": cells})
    return panels

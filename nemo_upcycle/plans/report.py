"""Show a job's plan: tables for people, JSON for programs."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nemo_upcycle.checkpoint import Span
from nemo_upcycle.plans.job import JobPlan, RankPlan
from nemo_upcycle.plans.layout import coordinates
from nemo_upcycle.plans.rank import Block, Shard, Target, block_bytes
from nemo_upcycle.progress import scaled, size

_LAYER = re.compile(r"\blayers\.\d+\.")
_EXPERT = re.compile(r"(?<=\bexperts\.)\d+(?=\.)")


@dataclass(frozen=True)
class RankKind:
    """Ranks of equal sizes: a row of the table."""

    owners: Sequence[RankPlan]

    @property
    def first(self) -> RankPlan:
        """The plan of the first of them."""
        return self.owners[0]

    @property
    def stages(self) -> list[int]:
        """Their pipeline stages."""
        return sorted({owner.place.pp for owner in self.owners})

    @property
    def ranks(self) -> int:
        """How many they are."""
        return sum(len(owner.ranks) for owner in self.owners)


def rank_kinds(job: JobPlan) -> list[RankKind]:
    """Return the ranks by equal sizes, in the order of their first ranks."""
    kinds: dict[object, list[RankPlan]] = {}
    for owner in job.owners:
        sizes = (
            sum(map(len, owner.layers)),
            len(owner.experts),
            owner.parameters,
            owner.bytes_to_read,
            owner.peak_bytes,
        )
        kinds.setdefault(sizes, []).append(owner)
    return [RankKind(owners) for owners in kinds.values()]


# --- For people ----------------------------------------------------------------------------------


def render(job: JobPlan, name: str) -> RenderableType:
    """Show the whole job: what it makes, its mapping, its kinds of ranks and its totals.

    Args:
        job: The plan.
        name: The recipe's name.
    """
    return Group(_head(job, name), _kinds_table(job), _totals(job))


def render_rank(job: JobPlan, name: str, rank: int) -> RenderableType:
    """Show one rank: where it stands, what it owns, and what fills it.

    Args:
        job: The plan.
        name: The recipe's name.
        rank: The rank.

    Raises:
        UpcyclingError: There is no such rank.
    """
    owner = job.of_rank(rank)
    place = coordinates(job.folding, job.world_size, rank)
    layers = [layer for chunk in owner.layers for layer in chunk]
    lines = {
        "rank": f"{rank} of {job.world_size}, on node {rank // job.num_gpus_per_node}; "
        f"{_count(len(owner.ranks), 'rank')} with the same shards",
        "place": f"tp {place.tp} · cp {place.cp} · dp {place.dp} · pp {place.pp}; "
        f"etp {place.etp} · ep {place.ep} · edp {place.edp}",
        "layers": spans_of(layers),
        "experts": spans_of(owner.experts),
        "owns": f"{owner.parameters:,} parameters in {len(owner.shards)} shards",
        "reads": size(owner.bytes_to_read),
        "writes": f"{size(owner.bytes_to_write)}, {job.dtype}",
        "memory": f"at most {size(owner.peak_bytes)} beyond the model, for loading",
    }
    return Group(_head(job, name), Text(), _pairs(lines), _copies_table(job, owner))


def _head(job: JobPlan, name: str) -> RenderableType:
    dense, upcycling, folding = job.dense, job.upcycling, job.folding
    moe = upcycling.num_moe_experts is not None
    active = f", {number(job.active_parameters)} active" if moe else ""
    title = Text.assemble(
        (name, "bold"),
        f": {dense.family.model_type} of {number(dense.parameters)} parameters → ",
        (upcycling.label, "bold"),
        f", {number(job.parameters)} parameters{active}",
    )
    virtual = folding.virtual_pipeline_model_parallel_size
    stages = f"PP{folding.pipeline_model_parallel_size}" + (f" · VPP{virtual}" if virtual else "")
    world = job.world_size
    lines = {
        "dense": f"{dense.source}: {', '.join(dense.dtypes)}, {size(dense.bytes)} in "
        f"{len(dense.family.shapes(dense.arch))} tensors ({dense.note})",
        "mapping": f"{_count(world, 'rank')} = {_count(job.num_nodes, 'node')} × "
        f"{job.num_gpus_per_node}",
        "attention": f"TP{folding.tensor_model_parallel_size} · CP{folding.context_parallel_size}"
        f" · DP{folding.data_parallel_size(world)} · {stages}",
        "experts": f"ETP{folding.expert_tensor_parallel_size} · "
        f"EP{folding.expert_model_parallel_size} · "
        f"EDP{folding.expert_data_parallel_size(world)} · {stages}",
        "step 0": str(job.exactness),
    }
    if not moe:
        del lines["experts"]
    return Group(title, Text(), _pairs(lines))


def _kinds_table(job: JobPlan) -> Table:
    table = _table("stage", "ranks", "e.g.", "layers", "experts", *_SIZES)
    for kind in rank_kinds(job):
        owner = kind.first
        table.add_row(
            spans_of(kind.stages),
            str(kind.ranks),
            str(owner.ranks[0]),
            str(sum(map(len, owner.layers))),
            str(len(owner.experts)),
            number(owner.parameters),
            size(owner.bytes_to_read),
            size(owner.bytes_to_write),
            size(owner.peak_bytes),
        )
    return table


_SIZES = ("parameters", "reads", "writes", "memory")


def _totals(job: JobPlan) -> RenderableType:
    times = job.bytes_to_read / job.dense.bytes
    lines = {
        "job reads": f"{size(job.bytes_to_read)}, {times:.3g} × the dense checkpoint; "
        f"{size(job.bytes_read_once)} with read_once",
        "node reads": f"at most {size(max(job.bytes_of_nodes))} from its file system",
        "job writes": f"{size(job.bytes_to_write)}, {job.dtype}",
        "memory": "peak of loading per rank, beyond the model",
        "replicas": f"{job.folding.expert_data_parallel_size(job.world_size)} of each expert",
        "copies": _copies_lines(job),
    }
    if job.upcycling.num_moe_experts is None:
        del lines["replicas"]
    return _pairs(lines)


def _copies_lines(job: JobPlan) -> str:
    """Return how often the dense tensors are written, by kind of tensor."""
    kinds: dict[int, dict[str, None]] = {}
    for name, count in job.copies.items():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        kinds.setdefault(count, {})[kind] = None
    return "\n".join(f"{count} × {', '.join(names)}" for count, names in sorted(kinds.items()))


def _copies_table(job: JobPlan, owner: RankPlan) -> RenderableType:
    table = Table("dense tensor", "→ parameter", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    for source, targets in _summary(job, owner).items():
        table.add_row(source, "\n".join(targets))
    legend = "Each layer and each expert E. [rows, columns]; ×n: n pieces between these rows."
    return Group(table, Text(legend, style="dim"))


def _summary(job: JobPlan, owner: RankPlan) -> dict[str, list[str]]:
    """Return what fills which parameter, once for all layers and experts filled alike."""
    pieces: dict[tuple[str, str], tuple[Block, Shard, set[Span], set[Span]]] = {}
    for block, targets in owner.plan.copies.items():
        for target in targets:
            shard = owner.shards[target.shard]
            part = f"{shard.name}{shard.offset}"
            piece = pieces.setdefault((block.tensor, part), (block, shard, set(), set()))
            piece[2].add(block.rows)
            piece[3].add(_rows_of(shard, target))
    summary: dict[str, dict[str, None]] = {}
    for block, shard, rows, places in pieces.values():
        dense = job.dense.tensors[block.tensor].shape
        source = _short(block.tensor) + _slice(dense, rows, block.columns)
        parameter = _short(shard.name) + _slice(shard.global_shape, places, shard.columns)
        summary.setdefault(source, {})[parameter] = None
    for router in owner.plan.routers:
        summary.setdefault("random values", {})[_short(owner.shards[router.shard].name)] = None
    for target in owner.plan.zeros:
        shard = owner.shards[target.shard]
        rows = {_rows_of(shard, target)}
        parameter = _short(shard.name) + _slice(shard.global_shape, rows, shard.columns)
        summary.setdefault("zeros", {})[parameter] = None
    return {source: list(parameters) for source, parameters in summary.items()}


def _rows_of(shard: Shard, target: Target) -> Span:
    return shard.offset[0] + target.rows[0], shard.offset[0] + target.rows[1]


def _short(name: str) -> str:
    """Return a name without common prefixes, layer and expert."""
    name = _EXPERT.sub("E", _LAYER.sub("", name))
    return name.removesuffix(".weight").removeprefix("model.").removeprefix("decoder.")


def _slice(shape: tuple[int, ...], rows: Iterable[Span], columns: Span | None) -> str:
    """Return a slice as text; empty for the whole tensor."""
    merged: list[Span] = []
    for start, stop in sorted(rows):
        if merged and start <= merged[-1][1]:
            start = merged.pop()[0]
        merged.append((start, stop))
    pieces = f" ×{len(merged)}" if len(merged) > 1 else ""
    shown = f"{merged[0][0]}:{merged[-1][1]}{pieces}"
    if merged == [(0, shape[0])]:
        shown = ""
    if columns is not None and columns != (0, shape[1]):
        shown = f"{shown or ':'}, {columns[0]}:{columns[1]}"
    return f"[{shown}]" if shown else ""


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _pairs(lines: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in lines.items():
        table.add_row(name, Text(value))
    return table


def spans_of(numbers: Iterable[int]) -> str:
    """Return numbers as text, with runs as `3–7` and even steps as `0, 4 … 28`."""
    ordered = sorted(numbers)
    steps = {b - a for a, b in pairwise(ordered)}
    if len(ordered) > 3 and len(steps) == 1 and steps != {1}:
        return f"{ordered[0]}, {ordered[1]} … {ordered[-1]}"
    runs = groupby(enumerate(ordered), key=lambda item: item[1] - item[0])
    spans = [[value for _, value in run] for _, run in runs]
    return ", ".join(f"{s[0]}–{s[-1]}" if len(s) > 1 else str(s[0]) for s in spans) or "none"


def number(count: float) -> str:
    """Return a count of parameters as text."""
    return scaled(count, 1000, ("", "K", "M", "B", "T"), precise=True)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# --- For programs --------------------------------------------------------------------------------


def to_json(job: JobPlan, name: str, rank: int | None = None) -> dict[str, Any]:
    """Return a plan as JSON objects.

    Args:
        job: The plan.
        name: The recipe's name.
        rank: A rank whose copies to include.

    Returns:
        - `recipe`: the recipe's name.
        - `dense`: `source`, `note` (what was there to look at), `model_type`, `dtypes`, `tensors`,
          `parameters`, `bytes`.
        - `upcycling`, `folding`: the fields of `UpcyclingConfig` and `ParallelFolding`.
        - `step_0`: `exact`, `reason`.
        - `job`: `world_size`, `num_nodes`, `num_gpus_per_node`, `data_parallel_size`,
          `expert_data_parallel_size`, `dtype`, `parameters`, `active_parameters`, `bytes_to_read`,
          `bytes_read_once`, `bytes_of_nodes` (by node), `bytes_to_write`, `read_amplification`,
          `copies` (by dense tensor).
        - `owners`: for all ranks that own the same, `ranks`, `pp`, `tp`, `etp`, `ep`, `layers`,
          `experts`, `shards`, `parameters`, `bytes_to_read`, `bytes_to_write`, `peak_bytes`.
        - `rank`, if given: `rank`, `node`, `coordinates`, and the owner's keys.
          `shards` here is a list of `name`, `global_shape`, `offset`, `shape`. Further keys are
          `copies` (`tensor`, `rows`, `columns`, `bytes`, `targets`), `routers` (`shard`, `layer`)
          and `zeros`. A target is an index `shard` into `shards`, and `rows`.

    Raises:
        UpcyclingError: There is no such rank.
    """
    result: dict[str, Any] = {
        "recipe": name,
        "dense": {
            "source": job.dense.source,
            "note": job.dense.note,
            "model_type": job.dense.family.model_type,
            "dtypes": job.dense.dtypes,
            "tensors": len(job.dense.family.shapes(job.dense.arch)),
            "parameters": job.dense.parameters,
            "bytes": job.dense.bytes,
        },
        "upcycling": asdict(job.upcycling),
        "folding": asdict(job.folding),
        "step_0": asdict(job.exactness),
        "job": _job_json(job),
        "owners": [_owner_json(owner) for owner in job.owners],
    }
    if rank is not None:
        result["rank"] = _rank_json(job, rank)
    return result


def _job_json(job: JobPlan) -> dict[str, Any]:
    return {
        "world_size": job.world_size,
        "num_nodes": job.num_nodes,
        "num_gpus_per_node": job.num_gpus_per_node,
        "data_parallel_size": job.folding.data_parallel_size(job.world_size),
        "expert_data_parallel_size": job.folding.expert_data_parallel_size(job.world_size),
        "dtype": job.dtype,
        "parameters": job.parameters,
        "active_parameters": job.active_parameters,
        "bytes_to_read": job.bytes_to_read,
        "bytes_read_once": job.bytes_read_once,
        "bytes_of_nodes": job.bytes_of_nodes,
        "bytes_to_write": job.bytes_to_write,
        "read_amplification": job.bytes_to_read / job.dense.bytes,
        "copies": job.copies,
    }


def _owner_json(owner: RankPlan) -> dict[str, Any]:
    pp, tp, etp, ep = owner.place.owner
    return {
        "ranks": owner.ranks,
        "pp": pp,
        "tp": tp,
        "etp": etp,
        "ep": ep,
        "layers": [layer for chunk in owner.layers for layer in chunk],
        "experts": list(owner.experts),
        "shards": len(owner.shards),
        "parameters": owner.parameters,
        "bytes_to_read": owner.bytes_to_read,
        "bytes_to_write": owner.bytes_to_write,
        "peak_bytes": owner.peak_bytes,
    }


def _rank_json(job: JobPlan, rank: int) -> dict[str, Any]:
    owner = job.of_rank(rank)
    plan = owner.plan
    return {
        "rank": rank,
        "node": rank // job.num_gpus_per_node,
        "coordinates": asdict(coordinates(job.folding, job.world_size, rank)),
        **_owner_json(owner),
        "shards": [asdict(shard) for shard in owner.shards],
        "copies": [_copy_json(job, block, targets) for block, targets in plan.copies.items()],
        "routers": [asdict(router) for router in plan.routers],
        "zeros": [asdict(target) for target in plan.zeros],
    }


def _copy_json(job: JobPlan, block: Block, targets: Sequence[Target]) -> dict[str, Any]:
    return {
        **asdict(block),
        "bytes": block_bytes(block, job.dense.tensors),
        "targets": [asdict(target) for target in targets],
    }

"""The plan of a whole job: what all ranks will read, hold and write, before launch."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import prod

from nemo_upcycle.checkpoint import DTYPE_BYTES, TensorInfo
from nemo_upcycle.checkpoint.described import Dense
from nemo_upcycle.config import PRECISIONS, Exactness, ParallelFolding, UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.plans.layout import (
    Coordinates,
    coordinates,
    shards_at,
    stage_experts,
    stage_layers,
    validate,
)
from nemo_upcycle.plans.rank import (
    Block,
    Plan,
    Shard,
    block_bytes,
    make_plan,
    peak_bytes,
    read_bytes,
)


@dataclass(frozen=True)
class RankPlan:
    """What the ranks that own the same do.

    Attributes:
        place: Where the first of them stands.
        ranks: They all.
        layers: Their layers, one range a virtual stage.
        experts: Their experts in every layer.
        shards: What they own.
        plan: What fills it.
        bytes_to_write: Size of the parameters.
        peak_bytes: The most memory that loading takes besides the model.
    """

    place: Coordinates
    ranks: tuple[int, ...]
    layers: tuple[range, ...]
    experts: range
    shards: tuple[Shard, ...] = field(repr=False)
    plan: Plan = field(repr=False)
    bytes_to_write: int
    peak_bytes: int

    @property
    def bytes_to_read(self) -> int:
        """Bytes per rank to read from the dense checkpoint."""
        return self.plan.bytes_to_read

    @property
    def parameters(self) -> int:
        """Elements per rank."""
        return sum(prod(shard.shape) for shard in self.shards)


@dataclass(frozen=True)
class JobPlan:
    """The plan of all ranks.

    Attributes:
        dense: The dense model.
        upcycling: What the dense feed-forward layers become.
        folding: The parallel mapping.
        num_nodes: Number of nodes.
        num_gpus_per_node: Ranks per node.
        dtype: The parameters' dtype, by safetensors' name.
        owners: The plans, one for all ranks that own the same shards, sorted by first rank.
    """

    dense: Dense
    upcycling: UpcyclingConfig
    folding: ParallelFolding
    num_nodes: int
    num_gpus_per_node: int
    dtype: str
    owners: tuple[RankPlan, ...] = field(repr=False)

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.num_nodes * self.num_gpus_per_node

    def of_rank(self, rank: int) -> RankPlan:
        """Return a rank's plan.

        Raises:
            UpcyclingError: There is no such rank.
        """
        for owner in self.owners:
            if rank in owner.ranks:
                return owner
        raise UpcyclingError(f"There is no rank {rank}; expected 0 to {self.world_size - 1}.")

    @property
    def exactness(self) -> Exactness:
        """Whether the model computes the dense model's function at step 0, and why."""
        gated = self.dense.arch.gated_linear_unit
        return self.upcycling.exactness(gated, self.dense.branches)

    @cached_property
    def parameters(self) -> int:
        """Elements of the model, each counted once."""
        return sum(prod(shard.shape) for shard in self._shards)

    @cached_property
    def active_parameters(self) -> int:
        """Elements used per token."""
        routed = sum(prod(shard.shape) for shard in self._shards if ".experts." in shard.name)
        return self.upcycling.active_parameters(self.parameters, routed)

    @cached_property
    def _shards(self) -> set[Shard]:
        return {shard for owner in self.owners for shard in owner.shards}

    @property
    def bytes_to_read(self) -> int:
        """Bytes that all ranks together read."""
        return sum(len(owner.ranks) * owner.bytes_to_read for owner in self.owners)

    @property
    def bytes_to_write(self) -> int:
        """Size of all ranks' parameters."""
        return sum(len(owner.ranks) * owner.bytes_to_write for owner in self.owners)

    @property
    def bytes_read_once(self) -> int:
        """Bytes that all ranks together read if each block is read once and broadcast."""
        blocks = {block for owner in self.owners for block in owner.plan.copies}
        return sum(read_bytes(block, self.dense.tensors) for block in blocks)

    @cached_property
    def bytes_of_nodes(self) -> tuple[int, ...]:
        """Bytes that each node reads from the file system, each byte once for all its ranks."""
        owner_of = {rank: i for i, owner in enumerate(self.owners) for rank in owner.ranks}
        size = self.num_gpus_per_node
        nodes = [
            frozenset(owner_of[rank] for rank in range(node * size, (node + 1) * size))
            for node in range(self.num_nodes)
        ]
        read = {
            node: distinct_bytes(
                (block for i in node for block in self.owners[i].plan.copies), self.dense.tensors
            )
            for node in set(nodes)
        }
        return tuple(read[node] for node in nodes)

    @cached_property
    def copies(self) -> dict[str, int]:
        """How many times the job writes each dense tensor."""
        written: dict[str, int] = defaultdict(int)
        for owner in self.owners:
            for block, targets in owner.plan.copies.items():
                size = block_bytes(block, self.dense.tensors)
                written[block.tensor] += size * len(targets) * len(owner.ranks)
        return {name: size // self.dense.tensors[name].bytes for name, size in written.items()}


def plan_job(
    dense: Dense,
    upcycling: UpcyclingConfig,
    folding: ParallelFolding,
    num_nodes: int,
    num_gpus_per_node: int,
    precision: str = "bf16-mixed",
) -> JobPlan:
    """Plan a job, once for all ranks that own the same shards.

    Args:
        dense: The dense model.
        upcycling: What the dense feed-forward layers become.
        folding: The parallel mapping.
        num_nodes: Nodes.
        num_gpus_per_node: Ranks per node.
        precision: A name of `config.PRECISIONS`.

    Raises:
        UpcyclingError: The mapping does not fit the model.
    """
    world_size = num_nodes * num_gpus_per_node
    if min(num_nodes, num_gpus_per_node) < 1:
        raise UpcyclingError(
            f"num_nodes is {num_nodes}, num_gpus_per_node {num_gpus_per_node}; expected 1 or more."
        )
    if precision not in PRECISIONS:
        raise UpcyclingError(
            f"precision is {precision!r}; expected one of: {', '.join(PRECISIONS)}."
        )
    validate(dense.arch, upcycling, folding, world_size)
    places: dict[object, list[tuple[int, Coordinates]]] = defaultdict(list)
    for rank in range(world_size):
        place = coordinates(folding, world_size, rank)
        places[place.owner].append((rank, place))
    dtype = PRECISIONS[precision].dtype
    owners = tuple(_rank_plan(dense, upcycling, folding, dtype, ranks) for ranks in places.values())
    return JobPlan(dense, upcycling, folding, num_nodes, num_gpus_per_node, dtype, owners)


def _rank_plan(
    dense: Dense,
    upcycling: UpcyclingConfig,
    folding: ParallelFolding,
    dtype: str,
    ranks: list[tuple[int, Coordinates]],
) -> RankPlan:
    place = ranks[0][1]
    shards = shards_at(dense.arch, upcycling, folding, place)
    plan = make_plan(shards, dense.tensors, dense.family, dense.arch, upcycling, dense.branches)
    return RankPlan(
        place=place,
        ranks=tuple(rank for rank, _ in ranks),
        layers=tuple(stage_layers(dense.arch.num_layers, folding)[place.pp]),
        experts=stage_experts(upcycling, folding, place.ep),
        shards=tuple(shards),
        plan=plan,
        bytes_to_write=sum(prod(shard.shape) for shard in shards) * DTYPE_BYTES[dtype],
        peak_bytes=peak_bytes(plan, dense.tensors, dtype),
    )


def distinct_bytes(blocks: Iterable[Block], tensors: Mapping[str, TensorInfo]) -> int:
    """Return the stored size of the union of blocks; overlaps count once.

    Args:
        blocks: Blocks of dense tensors.
        tensors: The dense checkpoint's tensors.
    """
    by_tensor: dict[str, set[Block]] = defaultdict(set)
    for block in blocks:
        by_tensor[block.tensor].add(block)
    total = 0
    for name, areas in by_tensor.items():
        info = tensors[name]
        read = _area(areas, info.width) * DTYPE_BYTES[info.dtype]
        total += info.stored(read) * info.sources
    return total


def _area(blocks: set[Block], width: int) -> int:
    """Return the area of a union of rectangles: strips of columns, in each a union of rows."""
    spans = [(block.columns or (0, width), block.rows) for block in blocks]
    edges = sorted({edge for columns, _ in spans for edge in columns})
    area = 0
    for left, right in pairwise(edges):
        last = 0
        for first, stop in sorted(rows for (low, high), rows in spans if low <= left < high):
            area += (right - left) * max(0, stop - max(first, last))
            last = max(last, stop)
    return area

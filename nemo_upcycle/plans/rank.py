"""The plan: which block of which dense tensor fills which shard of the MoE, as pure data.

A rank's plan is made from the shards that the rank owns and the dense checkpoint's headers.
Planning reads no weights and needs neither process groups nor torch. The plan does not know how a
parameter was sharded: a shard is just a rectangle of rows and columns of a parameter.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from nemo_upcycle.checkpoint import DTYPE_BYTES, Span, TensorInfo
from nemo_upcycle.checkpoint.branches import branch_name
from nemo_upcycle.checkpoint.dense import DEQUANTIZING_BYTES
from nemo_upcycle.checkpoint.megatron import VOCABULARY
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture, Family, Operation, Rows
from nemo_upcycle.families.names import (
    dense_name,
    expert_of,
    is_expert_bias,
    is_router,
    is_shared,
    layer_of,
)

CHUNK_BYTES = 4 * 2**20
"""Maximum size of a chunk: small enough to stay in the processor's cache until written."""

BUFFERS = 4
"""Chunks of the dense checkpoint in memory at a time, per rank."""


@dataclass(frozen=True)
class Shard:
    """A rank's part of a parameter.

    Attributes:
        name: Megatron's name with the global layer and expert filled in, such as
            `decoder.layers.3.mlp.experts.7.linear_fc1.weight`.
        global_shape: Rows (and columns) of the whole parameter.
        offset: Row (and column) of the whole parameter where the shard starts.
        shape: Rows (and columns) of the shard.
    """

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def rows(self) -> Span:
        """The shard's rows in the whole parameter."""
        return self.offset[0], self.offset[0] + self.shape[0]

    @property
    def columns(self) -> Span | None:
        """The shard's columns in the whole parameter; None for a vector."""
        return (self.offset[1], self.offset[1] + self.shape[1]) if len(self.shape) > 1 else None


@dataclass(frozen=True)
class Block:
    """Rows (and columns) of a dense tensor."""

    tensor: str
    rows: Span
    columns: Span | None


@dataclass(frozen=True)
class Target:
    """Rows of a shard, counted from the shard's start; `shard` is the index in the rank's list."""

    shard: int
    rows: Span


@dataclass(frozen=True)
class RouterTarget:
    """A shard of a router, with one row per expert."""

    shard: int
    layer: int


@dataclass(frozen=True)
class Plan:
    """How a rank fills its shards.

    Attributes:
        copies: Blocks to read, each once, with all targets.
        routers: Router shards to draw.
        zeros: Rows without a counterpart in the dense model (vocabulary padding, router bias).
        bytes_to_read: Size of all blocks as the checkpoint stores them.
        tensors: Names of the dense tensors that are read.
    """

    copies: Mapping[Block, tuple[Target, ...]]
    routers: tuple[RouterTarget, ...]
    zeros: tuple[Target, ...]
    bytes_to_read: int
    tensors: frozenset[str]


Segment = tuple[str, int, int]
"""A stored tensor with start and stop rows."""


def segments(
    rows: Iterable[Rows],
    tensors: Mapping[str, TensorInfo],
    name_of: Callable[[str], str],
    missing: Callable[[str], UpcyclingError],
) -> list[Segment]:
    """Return the stored rows that make up a parameter, one after another.

    Args:
        rows: The operation's rows for the parameter.
        tensors: The stored tensors.
        name_of: Fills layer and expert into a tensor's name.
        missing: Makes the error for a tensor that is not stored.

    Raises:
        UpcyclingError: A tensor is not stored.
    """
    segments = []
    for part in rows:
        name = name_of(part.tensor)
        if name not in tensors:
            raise missing(name)
        segments.append((name, *part.span(tensors[name].shape[0])))
    return segments


class PlanBuilder:
    """Builder of a rank's plan.

    Args:
        tensors: The stored tensors.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors
        self._copies: dict[Block, list[Target]] = {}
        self._routers: list[RouterTarget] = []
        self._zeros: list[Target] = []

    def copy(
        self, index: int, shard: Shard, parts: Sequence[Segment], columns: Span | None
    ) -> None:
        """Fill a shard with rows of the segments, and with zeros beyond the segments' end.

        Args:
            index: The shard's index in the rank's list.
            shard: The shard.
            parts: The segments that make up the whole parameter.
            columns: The shard's columns in the stored tensors.
        """
        for block, rows in cut(shard.rows, columns, parts):
            self._copies.setdefault(block, []).append(Target(index, rows))
        total = sum(stop - start for _, start, stop in parts)
        padding = max(shard.rows[0], total) - shard.rows[0], shard.shape[0]
        if padding[0] < padding[1]:
            self._zeros.append(Target(index, padding))

    def router(self, index: int, layer: int) -> None:
        """Draw a shard of a layer's router."""
        self._routers.append(RouterTarget(index, layer))

    def zero(self, index: int, shard: Shard) -> None:
        """Fill a shard with zeros."""
        self._zeros.append(Target(index, (0, shard.shape[0])))

    def plan(self) -> Plan:
        """Return the plan."""
        return Plan(
            copies={block: tuple(targets) for block, targets in self._copies.items()},
            routers=tuple(self._routers),
            zeros=tuple(self._zeros),
            bytes_to_read=sum(read_bytes(block, self.tensors) for block in self._copies),
            tensors=frozenset(block.tensor for block in self._copies),
        )


def is_padded(shard: Shard, rows: int) -> bool:
    """Return whether a shard belongs to a vocabulary padded beyond the stored rows."""
    return shard.name in VOCABULARY and shard.global_shape[0] > rows


@dataclass
class _Upcycling:
    """Finds the part of the dense model that fills each shard of an MoE."""

    builder: PlanBuilder
    family: Family
    arch: Architecture
    upcycling: UpcyclingConfig
    branches: int

    def add(self, index: int, shard: Shard) -> None:
        layer = layer_of(shard.name)
        if is_router(shard.name) and layer is not None:
            self._check_router(shard)
            self.builder.router(index, layer)
        elif is_expert_bias(shard.name):
            self.builder.zero(index, shard)
        else:
            self._add_copies(index, shard, layer)

    def _check_router(self, shard: Shard) -> None:
        expected = (self.upcycling.num_moe_experts, self.arch.hidden_size)
        if shard.global_shape != expected:
            raise UpcyclingError(
                f"{shard.name} is {list(shard.global_shape)}; expected {list(expected)} "
                "(num_moe_experts, hidden_size of the dense checkpoint)."
            )

    def _add_copies(self, index: int, shard: Shard, layer: int | None) -> None:
        operation = self.family.parameters.get(dense_name(shard.name))
        if operation is None:
            raise UpcyclingError(
                f"The model has {shard.name} {list(shard.global_shape)}, for which a "
                f"{self.family.model_type} checkpoint has no tensor. Remove the parameter from the "
                "model's config."
            )
        expert = expert_of(shard.name)
        neurons = None
        if expert is not None:
            neurons = self.upcycling.neurons(expert, self.arch.ffn_hidden_size)
        elif is_shared(shard.name):
            neurons = 0, self.upcycling.shared_width(self.arch.ffn_hidden_size)
        parts = self._segments(operation.rows(self.arch, neurons), shard, layer, expert)
        total = sum(stop - start for _, start, stop in parts)
        if shard.global_shape[0] != total and not is_padded(shard, total):
            raise self._mismatch(shard, "rows", shard.global_shape[0], total)
        columns = self._columns(shard, parts[0][0], operation, neurons)
        self.builder.copy(index, shard, parts, columns)

    def _segments(
        self, parts: Iterable[Rows], shard: Shard, layer: int | None, expert: int | None
    ) -> list[Segment]:
        def name_of(tensor: str) -> str:
            name = tensor.format(layer=layer)
            if expert is None or self.branches == 1:
                return name
            return branch_name(self.upcycling.copy_of(expert) % self.branches, name)

        def missing(tensor: str) -> UpcyclingError:
            return UpcyclingError(
                f"The model has {shard.name}, but the dense checkpoint has no {tensor} "
                f"(it has {self.arch.num_layers} layers and "
                f"{'tied' if self.arch.share_embeddings_and_output_weights else 'untied'} "
                "embeddings). Make the model's config from the checkpoint's config."
            )

        return segments(parts, self.builder.tensors, name_of, missing)

    def _columns(
        self, shard: Shard, tensor: str, operation: Operation, neurons: Span | None
    ) -> Span | None:
        """Return the shard's columns in the dense tensor; in an expert's down these are neurons."""
        expected = self.builder.tensors[tensor].shape[1:]
        skipped = 0
        if operation.columns_are_neurons and neurons is not None:
            expected, skipped = (neurons[1] - neurons[0],), neurons[0]
        if shard.global_shape[1:] != expected:
            raise self._mismatch(shard, "columns", shard.global_shape[1:], expected)
        if shard.columns is None:
            return None
        return shard.columns[0] + skipped, shard.columns[1] + skipped

    def _mismatch(
        self, shard: Shard, axis: str, actual: object, expected: object
    ) -> UpcyclingError:
        if expert_of(shard.name) is not None:
            granularity = self.upcycling.granularity
            share = f"1/{granularity} as wide as" if granularity > 1 else "as wide as"
            if self.upcycling.moe_shared_expert_intermediate_size is not None:
                share += " what the shared expert leaves of"
            width = self.upcycling.expert_width(self.arch.ffn_hidden_size)
            return UpcyclingError(
                f"The model's {shard.name} has {actual} {axis}, the dense checkpoint gives "
                f"{expected}: experts must be {share} the dense feed-forward layer. "
                f"Set moe_ffn_hidden_size={width} in the model's config."
            )
        return UpcyclingError(
            f"The model's {shard.name} has {actual} {axis}, the dense checkpoint gives {expected}. "
            "Make the model's config from the checkpoint's config."
        )


def make_plan(
    shards: Iterable[Shard],
    tensors: Mapping[str, TensorInfo],
    family: Family,
    arch: Architecture,
    upcycling: UpcyclingConfig,
    branches: int = 1,
) -> Plan:
    """Plan which blocks of which dense tensors fill each shard.

    Args:
        shards: The shards that the rank owns.
        tensors: The dense checkpoint's tensors.
        family: The dense model's family.
        arch: The dense model's architecture.
        upcycling: What the dense feed-forward layers become.
        branches: Number of dense models; copies of the layer take experts from each in turn.

    Returns:
        The plan, covering every element of every shard exactly once.

    Raises:
        UpcyclingError: A shard has no source, or does not fit the source.
    """
    builder = PlanBuilder(tensors)
    add = _Upcycling(builder, family, arch, upcycling, branches).add
    for index, shard in enumerate(shards):
        add(index, shard)
    return builder.plan()


def block_bytes(block: Block, tensors: Mapping[str, TensorInfo]) -> int:
    """Return the size of a block in the checkpoint's dtype."""
    return (block.rows[1] - block.rows[0]) * _row_bytes(block, tensors)


def read_bytes(block: Block, tensors: Mapping[str, TensorInfo]) -> int:
    """Return the bytes read for a block: the stored size, times the checkpoints averaged."""
    info = tensors[block.tensor]
    return info.stored(block_bytes(block, tensors)) * info.sources


def chunk_spans(rows: Span, row_bytes: int) -> Iterator[Span]:
    """Yield runs of rows that fit `CHUNK_BYTES`, each of at least one row."""
    start, stop = rows
    step = max(1, CHUNK_BYTES // row_bytes)
    for row in range(start, stop, step):
        yield row, min(row + step, stop)


def chunks(block: Block, tensors: Mapping[str, TensorInfo]) -> Iterator[Span]:
    """Yield the chunks of a block as runs of rows."""
    return chunk_spans(block.rows, _row_bytes(block, tensors))


def peak_bytes(plan: Plan, tensors: Mapping[str, TensorInfo], dtype: str) -> int:
    """Return the peak memory of executing a plan, beyond the model.

    Args:
        plan: The plan of one rank.
        tensors: The dense checkpoint's tensors.
        dtype: The parameters' dtype, by safetensors' name.

    Returns:
        Bytes of the buffers, each as large as the largest chunk, plus the memory of averaging and
            of dequantizing. A chunk that goes to several places in another dtype than the
            checkpoint's needs one more chunk. Initializers run later and need less: see
            `engine/experts.py`.
    """
    largest = converted = averaged = strips = count = 0
    for block, targets in plan.copies.items():
        row_bytes = _row_bytes(block, tensors)
        spans = list(chunks(block, tensors))
        rows = spans[0][1] - spans[0][0]
        count += len(spans)
        largest = max(largest, rows * row_bytes)
        source = tensors[block.tensor].dtype
        values = rows * row_bytes // DTYPE_BYTES[source]
        if source != dtype and len(targets) > 1:
            converted = max(converted, values * DTYPE_BYTES[dtype])
        if tensors[block.tensor].packed is not None:  # a strip, and a scale per row
            strips = max(strips, DEQUANTIZING_BYTES + rows * DTYPE_BYTES["F32"])
        if tensors[block.tensor].sources > 1:  # two chunks more, and two in fp32
            averaged = max(averaged, 2 * rows * row_bytes + 2 * values * DTYPE_BYTES["F32"])
    return min(BUFFERS, count) * (largest + averaged + strips) + converted


def _row_bytes(block: Block, tensors: Mapping[str, TensorInfo]) -> int:
    columns = 1 if block.columns is None else block.columns[1] - block.columns[0]
    return columns * DTYPE_BYTES[tensors[block.tensor].dtype]


def cut(rows: Span, columns: Span | None, parts: Iterable[Segment]) -> Iterator[tuple[Block, Span]]:
    """Yield the parts of the segments inside a shard, with the shard rows that each part fills."""
    first, last = rows
    position = 0
    for tensor, start, stop in parts:
        low, high = max(first, position), min(last, position + stop - start)
        if low < high:
            source = (start + low - position, start + high - position)
            yield Block(tensor, source, columns), (low - first, high - first)
        position += stop - start

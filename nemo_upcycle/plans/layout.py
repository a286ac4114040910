"""What each rank owns, without Megatron: coordinates in the mapping, layers, shards.

Megatron's order of ranks is tp-cp-ep-dp-pp, the first fastest: attention is distributed over
TP×CP×DP×PP and experts over ETP×EP×EDP×PP. `engine.owned_shards` reads from an existing model what
a rank owns; this module computes the same without a model, so that a job can be planned anywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.config.layers import moe_layers
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture, dimensions
from nemo_upcycle.families.names import EXPERT_BIAS
from nemo_upcycle.plans.rank import Shard


@dataclass(frozen=True)
class Coordinates:
    """A rank's coordinates: tp, cp, dp, pp for attention; etp, ep, edp, pp for experts."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int

    @property
    def owner(self) -> tuple[int, int, int, int]:
        """(pp, tp, etp, ep): ranks with equal values own the same shards."""
        return self.pp, self.tp, self.etp, self.ep


def padded_vocabulary(vocab_size: int, divisor: int) -> int:
    """Return the rows of the embeddings: the vocabulary, padded to a multiple of `divisor`."""
    return vocab_size + -vocab_size % divisor


def coordinates(folding: ParallelFolding, world_size: int, rank: int) -> Coordinates:
    """Return a rank's coordinates in Megatron's order of ranks.

    Args:
        folding: The parallel mapping.
        world_size: Ranks of the job.
        rank: The global rank.

    Raises:
        UpcyclingError: The mapping does not divide the world size, or has no such rank.
    """
    if not 0 <= rank < world_size:
        raise UpcyclingError(f"There is no rank {rank}; expected 0 to {world_size - 1}.")
    tp, cp, dp, pp = _digits(
        rank,
        folding.tensor_model_parallel_size,
        folding.context_parallel_size,
        folding.data_parallel_size(world_size),
    )
    etp, ep, edp, _ = _digits(
        rank,
        folding.expert_tensor_parallel_size,
        folding.expert_model_parallel_size,
        folding.expert_data_parallel_size(world_size),
    )
    return Coordinates(tp, cp, dp, pp, etp, ep, edp)


def _digits(number: int, *sizes: int) -> Iterator[int]:
    """Yield a number's digits in mixed bases, the lowest first, and then the rest."""
    for size in sizes:
        number, digit = divmod(number, size)
        yield digit
    yield number


def validate(
    arch: Architecture,
    upcycling: UpcyclingConfig,
    folding: ParallelFolding,
    world_size: int | None = None,
) -> None:
    """Check that a mapping fits a model.

    Args:
        arch: The dense model's architecture.
        upcycling: What the dense feed-forward layers become.
        folding: The parallel mapping.
        world_size: Ranks of the job, if known.

    Raises:
        UpcyclingError: A size does not divide.
    """
    experts = upcycling.num_moe_experts
    if experts is None and folding.expert_model_parallel_size > 1:
        raise UpcyclingError(
            f"expert_model_parallel_size is {folding.expert_model_parallel_size}, but the model "
            "has no experts (num_moe_experts is None); use 1."
        )
    folding.validate(world_size, experts)
    tp = "tensor_model_parallel_size"
    sizes = [
        ("num_attention_heads", arch.num_attention_heads, tp),
        ("num_query_groups", arch.num_query_groups, tp),
    ]
    if experts is None or upcycling.moe_shared_expert or not all(_moe_layers(arch, upcycling)):
        sizes.append(("ffn_hidden_size", arch.ffn_hidden_size, tp))
    if experts is not None:
        width = upcycling.expert_width(arch.ffn_hidden_size)
        shared = upcycling.shared_width(arch.ffn_hidden_size)
        if 0 < shared < arch.ffn_hidden_size:
            sizes.append(("moe_shared_expert_intermediate_size", shared, tp))
            name = "moe_ffn_hidden_size"
        else:
            granularity = upcycling.granularity
            name = "ffn_hidden_size" if granularity == 1 else f"ffn_hidden_size / {granularity}"
        sizes.append((name, width, "expert_tensor_parallel_size"))
    for name, size, split in sizes:
        _check_divides(name, size, split, getattr(folding, split))
    stage_layers(arch.num_layers, folding)


def validate_expert_width(
    arch: Architecture, upcycling: UpcyclingConfig, moe_ffn_hidden_size: int | None
) -> None:
    """Check that experts are as wide as a shard of the dense feed-forward layer.

    Args:
        arch: The dense model's architecture.
        upcycling: What the dense feed-forward layers become.
        moe_ffn_hidden_size: The experts' width; None is always accepted.

    Raises:
        UpcyclingError: The experts have another width.
    """
    width = upcycling.expert_width(arch.ffn_hidden_size)
    if moe_ffn_hidden_size not in (None, width):
        raise UpcyclingError(
            f"moe_ffn_hidden_size is {moe_ffn_hidden_size}; with granularity="
            f"{upcycling.granularity} each expert is {width} of the dense feed-forward layer's "
            f"width of {arch.ffn_hidden_size}. Leave moe_ffn_hidden_size out, and set granularity."
        )


def _check_divides(name: str, value: int, split: str, size: int) -> None:
    if value % size:
        raise UpcyclingError(
            f"{name}={value} does not divide by {split}={size}; choose a divisor of {value}."
        )


def _moe_layers(arch: Architecture, upcycling: UpcyclingConfig) -> tuple[bool, ...]:
    """Say of every layer whether it has experts."""
    if upcycling.num_moe_experts is None:
        return (False,) * arch.num_layers
    return moe_layers(upcycling.moe_layer_freq, arch.num_layers)


def stage_layers(num_layers: int, folding: ParallelFolding) -> list[list[range]]:
    """Return the layers of each pipeline stage, one range a virtual stage.

    Layers follow each other through all stages, once for each virtual stage; embedding and loss
    take a layer's place where the folding says so.

    Args:
        num_layers: Layers of the model.
        folding: The parallel mapping.

    Raises:
        UpcyclingError: The mapping does not fit the layers.
    """
    stages = folding.pipeline_model_parallel_size
    virtual = folding.virtual_pipeline_model_parallel_size or 1
    counts = _places(num_layers, folding)
    for stage, count in enumerate(counts):
        if count % virtual:
            raise UpcyclingError(
                f"Pipeline stage {stage} has {count} of the {num_layers} layers, which do not "
                f"divide over virtual_pipeline_model_parallel_size={virtual}; "
                f"choose a divisor of {count}, or other stages."
            )
    chunks = [counts[stage] // virtual for _ in range(virtual) for stage in range(stages)]
    chunks[0] -= folding.account_for_embedding_in_pipeline_split
    chunks[-1] -= folding.account_for_loss_in_pipeline_split
    ranges = [range(*ends) for ends in pairwise(accumulate(chunks, initial=0))]
    return [ranges[stage::stages] for stage in range(stages)]


def _places(num_layers: int, folding: ParallelFolding) -> list[int]:
    """Return the number of layers per stage, including embedding and loss if they count."""
    stages = folding.pipeline_model_parallel_size
    first = folding.num_layers_in_first_pipeline_stage
    last = folding.num_layers_in_last_pipeline_stage
    left = (
        num_layers
        + folding.account_for_embedding_in_pipeline_split
        + folding.account_for_loss_in_pipeline_split
        - (first or 0)
        - (last or 0)
    )
    middle = stages - (first is not None) - (last is not None)
    if middle == 0 and folding.virtual_pipeline_model_parallel_size is not None:
        raise UpcyclingError(
            "With pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage and "
            "num_layers_in_last_pipeline_stage, Megatron-Core supports no virtual stages. "
            "Set only one of the two numbers of layers; the other stage takes the rest."
        )
    if left < middle or (left if middle == 0 else left % middle):
        raise _uneven(num_layers, folding, left, middle)
    even = left // middle if middle else 0
    places = [even] * stages
    places[0] = places[0] if first is None else first
    places[-1] = places[-1] if last is None else last
    return places


def _uneven(num_layers: int, folding: ParallelFolding, left: int, middle: int) -> UpcyclingError:
    settings = {
        name: value
        for name, value in vars(folding).items()
        if name.startswith(("pipeline_", "num_layers_", "account_")) and value not in (None, False)
    }
    said = ", ".join(f"{name}={value}" for name, value in settings.items())
    return UpcyclingError(
        f"{num_layers} layers do not divide over the pipeline stages: {left} places are left for "
        f"{middle} even stages ({said}). Choose a pipeline_model_parallel_size that divides, or "
        "uneven stages that leave a multiple."
    )


def stage_experts(upcycling: UpcyclingConfig, folding: ParallelFolding, ep: int) -> range:
    """Return the experts of an expert-parallel rank, per layer; none in a dense model."""
    count = (upcycling.num_moe_experts or 0) // folding.expert_model_parallel_size
    return range(ep * count, (ep + 1) * count)


def shards(
    arch: Architecture,
    upcycling: UpcyclingConfig,
    folding: ParallelFolding,
    world_size: int,
    rank: int,
) -> list[Shard]:
    """Return the shards that a rank owns.

    Args:
        arch: The dense model's architecture.
        upcycling: What the dense feed-forward layers become.
        folding: The parallel mapping.
        world_size: Ranks of the job.
        rank: The global rank.

    Returns:
        The shards that `engine.owned_shards` finds in Megatron's model on that rank.

    Raises:
        UpcyclingError: The mapping does not fit the model, or there is no such rank.
    """
    validate(arch, upcycling, folding, world_size)
    return shards_at(arch, upcycling, folding, coordinates(folding, world_size, rank))


def shards_at(
    arch: Architecture, upcycling: UpcyclingConfig, folding: ParallelFolding, place: Coordinates
) -> list[Shard]:
    """Return the shards of a rank with these coordinates, in a folding that fits."""
    return list(_Owner(arch, upcycling, folding, place).shards())


@dataclass(frozen=True)
class _Owner:
    """A rank of a model; parameters have Megatron's names, with Transformer Engine's norms."""

    arch: Architecture
    upcycling: UpcyclingConfig
    folding: ParallelFolding
    place: Coordinates

    @cached_property
    def is_moe(self) -> tuple[bool, ...]:
        return _moe_layers(self.arch, self.upcycling)

    def shards(self) -> Iterator[Shard]:
        arch, stage = self.arch, self.place.pp
        first, last = stage == 0, stage == self.folding.pipeline_model_parallel_size - 1
        if first:
            yield self._vocabulary("embedding.word_embeddings.weight")
        for layers in stage_layers(arch.num_layers, self.folding)[stage]:
            for layer in layers:
                yield from self._layer(layer)
        if last:
            yield from self._norm("decoder.final_layernorm.")
            if not arch.share_embeddings_and_output_weights:
                yield self._vocabulary("output_layer.weight")
            elif not first:  # a copy of the first stage's embedding, under the same name
                yield self._vocabulary("embedding.word_embeddings.weight")

    def _vocabulary(self, name: str) -> Shard:
        size = self.folding.tensor_model_parallel_size
        rows = padded_vocabulary(self.arch.vocab_size, size)
        return _split(name, (rows, self.arch.hidden_size), 0, self.place.tp, size)

    def _norm(self, prefix: str) -> Iterator[Shard]:
        yield _whole(prefix + "weight", self.arch.hidden_size)
        if self.arch.norm_has_bias:
            yield _whole(prefix + "bias", self.arch.hidden_size)

    def _layer(self, number: int) -> Iterator[Shard]:
        layer = f"decoder.layers.{number}."
        yield from self._attention(layer + "self_attention.")
        tp, size = self.place.tp, self.folding.tensor_model_parallel_size
        experts, width = self.upcycling.num_moe_experts, self.arch.ffn_hidden_size
        if experts is None or not self.is_moe[number]:
            yield from self._norm(layer + "mlp.linear_fc1.layer_norm_")
            yield from self._feed_forward(layer + "mlp.", width, tp, size)
            return
        yield from self._norm(layer + "pre_mlp_layernorm.")
        yield _whole(layer + "mlp.router.weight", experts, self.arch.hidden_size)
        if self.upcycling.moe_router_enable_expert_bias:
            yield _whole(layer + EXPERT_BIAS, experts)
        for expert in stage_experts(self.upcycling, self.folding, self.place.ep):
            yield from self._feed_forward(
                f"{layer}mlp.experts.{expert}.",
                self.upcycling.expert_width(width),
                self.place.etp,
                self.folding.expert_tensor_parallel_size,
            )
        if shared := self.upcycling.shared_width(width):
            yield from self._feed_forward(layer + "mlp.shared_experts.", shared, tp, size)

    def _attention(self, prefix: str) -> Iterator[Shard]:
        arch, tp, size = self.arch, self.place.tp, self.folding.tensor_model_parallel_size
        sizes = dimensions(arch)
        hidden, qkv, queries = arch.hidden_size, sizes["qkv"], sizes["queries"]
        yield from self._norm(prefix + "linear_qkv.layer_norm_")
        yield _split(prefix + "linear_qkv.weight", (qkv, hidden), 0, tp, size)
        if arch.add_qkv_bias:
            start, rows = tp * qkv // size, qkv // size
            yield Shard(prefix + "linear_qkv.bias", (qkv,), (start,), (rows,))
        if arch.qk_layernorm:
            yield _whole(prefix + "q_layernorm.weight", arch.kv_channels)
            yield _whole(prefix + "k_layernorm.weight", arch.kv_channels)
        yield _split(prefix + "linear_proj.weight", (hidden, queries), 1, tp, size)

    def _feed_forward(self, prefix: str, width: int, part: int, size: int) -> Iterator[Shard]:
        """Yield gate and up, which are one parameter of two shards, and down."""
        hidden, rows = self.arch.hidden_size, width // size
        name, shape = prefix + "linear_fc1.weight", (self.arch.fc1_rows * width, hidden)
        for half in range(self.arch.fc1_rows):
            yield Shard(name, shape, (half * width + part * rows, 0), (rows, hidden))
        yield _split(prefix + "linear_fc2.weight", (hidden, width), 1, part, size)


def _whole(name: str, *shape: int) -> Shard:
    return Shard(name, shape, (0,) * len(shape), shape)


def _split(name: str, shape: tuple[int, int], axis: int, part: int, size: int) -> Shard:
    """Return one of `size` equal parts along an axis of a matrix."""
    rows, columns = shape
    if axis == 0:
        return Shard(name, shape, (part * rows // size, 0), (rows // size, columns))
    return Shard(name, shape, (0, part * columns // size), (rows, columns // size))

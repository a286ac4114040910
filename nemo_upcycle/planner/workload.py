"""The planner's input: a model with a batch, and a parallel mapping."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import product
from math import lcm, prod
from operator import attrgetter
from typing import Any

from nemo_upcycle.config import (
    ACCOUNTED_LAYERS,
    PRECISIONS,
    UNEVEN_STAGES,
    OptimizerStorage,
    ParallelFolding,
    UpcyclingConfig,
)
from nemo_upcycle.families import Architecture
from nemo_upcycle.families.model import MoEModel, upcycled_model
from nemo_upcycle.families.names import is_expert_bias
from nemo_upcycle.planner.flops import Flops, flops
from nemo_upcycle.plans.layout import Coordinates, shards_at, stage_layers

KINDS = ("moe", "dense", "before", "after", "copy")
"""Kinds of parameters: of an MoE layer, of a dense layer, before and after the layers, and the copy
of the embedding."""

STAGES = (*UNEVEN_STAGES, *ACCOUNTED_LAYERS)
"""The fields of a folding that make stages uneven."""

OF_STAGES = (ParallelFolding.NAMES["pp"], ParallelFolding.NAMES["vpp"], *STAGES)
"""The fields of a folding that decide which layers are in a stage."""

_of_stages = attrgetter(*OF_STAGES)


@dataclass(frozen=True, eq=False)
class Workload:
    """A model and a batch.

    Attributes:
        arch: The dense model's architecture.
        upcycling: What the dense feed-forward layers become.
        seq_length: Tokens per sequence.
        global_batch_size: Sequences per step.
        precision: A name of `config.PRECISIONS`.
        optimizer: How Adam's state and the gradients are kept.
    """

    arch: Architecture
    upcycling: UpcyclingConfig
    seq_length: int
    global_batch_size: int
    precision: str = "bf16-mixed"
    optimizer: OptimizerStorage = field(default_factory=OptimizerStorage)

    @cached_property
    def model(self) -> MoEModel:
        """The MoE model."""
        return upcycled_model(self.arch, self.upcycling)

    @cached_property
    def flops(self) -> Flops:
        """Operations per sequence."""
        capacity = self.upcycling.moe_expert_capacity_factor if self.is_moe else None
        return flops(self.model, self.seq_length, capacity)

    @property
    def visited(self) -> int:
        """Experts that compute a token in training."""
        return self.model.num_experts if self.upcycling.router_dense_gradient else self.model.topk

    @property
    def is_moe(self) -> bool:
        """Whether there are experts."""
        return self.upcycling.num_moe_experts is not None

    @property
    def element_bytes(self) -> int:
        """Bytes per parameter and per activation."""
        return 2 if PRECISIONS[self.precision].is_bf16 else 4

    @property
    def factor_bytes(self) -> int:
        """Bytes per value of a product's factor that is kept for the backward pass."""
        return 1 if PRECISIONS[self.precision].is_fp8 else self.element_bytes

    @property
    def fp8_layers(self) -> float:
        """Fraction of the layers whose matrix products are in FP8."""
        precision = PRECISIONS[self.precision]
        ends = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
        left = self.arch.num_layers - sum(precision.fields.get(name, 0) for name in ends)
        return max(0, left) / self.arch.num_layers if precision.is_fp8 else 0.0

    def storing(self, optimizer: OptimizerStorage) -> "Workload":
        """Return the same workload with the optimizer stored in another way."""
        other = replace(self, optimizer=optimizer)
        # The same ranks own the same parameters, which takes long to find out.
        vars(other)["_laid_out"] = vars(self).get("_laid_out", self)
        return other

    def stages(self, folding: ParallelFolding) -> list[tuple[int, int]]:
        """Return the number of MoE layers and dense layers in each pipeline stage."""
        return vars(self).get("_laid_out", self)._stages(_of_stages(folding))

    @cache  # noqa: B019 - a workload lives as long as its plan
    def _stages(self, stages: tuple[Any, ...]) -> list[tuple[int, int]]:
        counts = []
        for chunks in self._layers(stages):
            layers = [self.model.is_moe[layer] for chunk in chunks for layer in chunk]
            counts.append((sum(layers), len(layers) - sum(layers)))
        return counts

    @cache  # noqa: B019
    def _layers(self, stages: tuple[Any, ...]) -> list[list[range]]:
        """Return the layers of each stage, per virtual stage."""
        folding = ParallelFolding(**dict(zip(OF_STAGES, stages, strict=True)))
        return stage_layers(self.arch.num_layers, folding)

    def buffers(self, folding: ParallelFolding, stage: int) -> "Counter[Buffer]":
        """Count a rank's buffers: per virtual stage, one for experts and one for all else."""
        sizes = (
            folding.tensor_model_parallel_size,
            folding.expert_tensor_parallel_size,
            folding.expert_model_parallel_size,
        )
        laid_out = vars(self).get("_laid_out", self)
        return laid_out._buffers(sizes, _of_stages(folding), stage)

    @cache  # noqa: B019
    def _buffers(
        self, sizes: tuple[int, int, int], stages: tuple[Any, ...], stage: int
    ) -> "Counter[Buffer]":
        found: Counter[Buffer] = Counter()
        for kinds, count in self._virtual_stages(stages, stage).items():
            for buffer in self._buffers_of(sizes, kinds):
                found[buffer] += count
        return found

    @cache  # noqa: B019
    def _virtual_stages(self, stages: tuple[Any, ...], stage: int) -> Counter[tuple[int, ...]]:
        """Count a stage's virtual stages by how many of each of `KINDS` they have."""
        every = self._layers(stages)
        chunks = every[stage]
        found: Counter[tuple[int, ...]] = Counter()
        for number, layers in enumerate(chunks):
            moe = sum(map(self.model.is_moe.__getitem__, layers))
            before = stage == 0 and number == 0
            after = stage == len(every) - 1 and number == len(chunks) - 1
            # Where the embedding is the output layer too, the last stage has a copy.
            found[moe, len(layers) - moe, before, after, after and stage > 0] += 1
        return found

    @cache  # noqa: B019
    def _buffers_of(
        self, sizes: tuple[int, int, int], kinds: tuple[int, ...]
    ) -> "tuple[Buffer, ...]":
        return tuple(_buffers(self._parts(*sizes), dict(zip(KINDS, kinds, strict=True))))

    @cache  # noqa: B019
    def _parts(self, tp: int, etp: int, ep: int) -> "dict[tuple[str, bool], Buffer]":
        """Return the parameters of each of `KINDS`, and of experts or all else."""
        layers = self.arch.num_layers
        # Each layer is a stage, so that a layer can be looked at alone.
        folding = ParallelFolding.of(tp=tp, etp=etp, ep=ep, pp=layers)
        wanted = {0, layers - 1, *(self.model.is_moe.index(kind) for kind in {*self.model.is_moe})}
        sizes: dict[tuple[str, bool], dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for stage in wanted:
            place = Coordinates(tp=0, cp=0, dp=0, pp=stage, etp=0, ep=0, edp=0)
            named = shards_at(self.arch, self.upcycling, folding, place)
            kind = "moe" if self.model.is_moe[stage] else "dense"
            sizes[kind, False].clear()
            sizes[kind, True].clear()
            for shard in named:
                if is_expert_bias(shard.name):  # no parameter: neither gradient nor state
                    continue
                parts = shard.name.split(".")
                where = kind
                if parts[0] == "embedding":
                    where = "before" if stage == 0 else "copy"
                elif parts[1] != "layers":
                    where = "after"
                sizes[where, "experts" in parts][shard.name] += prod(shard.shape)
        return {
            (kind, is_expert): Buffer(
                is_expert,
                sum(sizes[kind, is_expert].values()),
                sum(_pad(size, 64) for size in sizes[kind, is_expert].values()),
            )
            for kind, is_expert in product(KINDS, (False, True))
        }


@dataclass(frozen=True)
class Buffer:
    """Parameters that share a contiguous buffer in Megatron's DDP.

    Attributes:
        is_expert: Whether the parameters belong to experts.
        elements: Elements of the parameters.
        aligned: Elements with each parameter padded to a multiple of 64.
    """

    is_expert: bool
    elements: int
    aligned: int

    def padded(self, ranks: int) -> int:
        """Return the buffer's elements, padded so that the ranks divide them.

        Args:
            ranks: Ranks that share the optimizer's state.
        """
        return _pad(self.aligned, lcm(ranks, 128))


def _buffers(parts: dict[tuple[str, bool], Buffer], counts: dict[str, int]) -> Iterator[Buffer]:
    """Yield the buffers of a virtual stage.

    Args:
        parts: Parameters by kind, and by whether they belong to experts.
        counts: How many of each kind the virtual stage has.
    """
    for is_expert in (False, True):
        each = [(parts[kind, is_expert], n) for kind, n in counts.items() if n]
        elements = sum(part.elements * n for part, n in each)
        if elements:
            yield Buffer(is_expert, elements, sum(part.aligned * n for part, n in each))


def _pad(number: int, to: int) -> int:
    return -(-number // to) * to


@dataclass(frozen=True)
class Mapping:
    """One way to train a workload.

    Attributes:
        folding: The parallel mapping.
        world_size: Number of GPUs.
        micro_batch_size: Sequences of a microbatch.
        recompute: What is computed again instead of kept: a key of `config.RECOMPUTE`.
    """

    folding: ParallelFolding
    world_size: int
    micro_batch_size: int = 1
    recompute: str = "none"

    def __str__(self) -> str:
        """Return the papers' notation: TP2 CP1 PP4 · ETP1 EP8 · microbatch 1 · no recompute."""
        recompute = "no recompute" if self.recompute == "none" else f"recompute {self.recompute}"
        return f"{self.folding} · microbatch {self.micro_batch_size} · {recompute}"

    @property
    def data_parallel(self) -> int:
        """DP."""
        return self.folding.data_parallel_size(self.world_size)

    @property
    def gradient_ranks(self) -> int:
        """Ranks that share the gradients of non-expert parameters: DP·CP."""
        return self.data_parallel * self.folding.context_parallel_size

    @property
    def expert_gradient_ranks(self) -> int:
        """Ranks that share the gradients of experts: EDP."""
        return self.folding.expert_data_parallel_size(self.world_size)

    def replicas(self, buffer: Buffer) -> tuple[int, int]:
        """Return how many ranks hold a buffer's parameters, and the distance between the ranks."""
        folding = self.folding
        if buffer.is_expert:
            stride = folding.expert_tensor_parallel_size * folding.expert_model_parallel_size
            return self.expert_gradient_ranks, stride
        return self.gradient_ranks, folding.tensor_model_parallel_size

    def tokens(self, seq_length: int) -> float:
        """Return the tokens per microbatch on a GPU between the layers."""
        folding = self.folding
        split = folding.tensor_model_parallel_size * folding.context_parallel_size
        return seq_length * self.micro_batch_size / split

    def microbatches(self, global_batch_size: int) -> int:
        """Return the microbatches per step; 0 if the batch does not divide."""
        each = self.data_parallel * self.micro_batch_size
        return 0 if global_batch_size % each else global_batch_size // each

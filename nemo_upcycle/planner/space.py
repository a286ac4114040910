"""All mappings of a model on a number of GPUs; what a user sets is kept, whatever its value."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from nemo_upcycle.config import ACCOUNTED_LAYERS, RECOMPUTE, UNEVEN_STAGES, ParallelFolding
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.planner.hardware import Hardware
from nemo_upcycle.planner.workload import STAGES, Mapping, Workload
from nemo_upcycle.plans.layout import validate

SIZES = (1, 2, 4, 8, 16)
"""Sizes of TP, CP and ETP that are tried inside an NVLink domain, where no other size is given."""

MICRO_BATCH_SIZES = (1, 2, 4)
"""Microbatch sizes that are tried where none is given, whatever the length of a sequence."""

MOST_TOKENS = 32768
"""Tokens of a microbatch up to which larger sizes are tried too: with short sequences a GPU waits
for its host unless a microbatch has many."""

FEWEST_TOKENS = 4096
"""Tokens per sequence and rank from which CP is tried beyond the NVLink domain."""

Allowed = Callable[[Mapping], bool]


def everything(mapping: Mapping) -> bool:
    """Allow any mapping."""
    return True


@dataclass(frozen=True)
class Given:
    """Settings that are given. Allows the mappings that have them.

    Attributes:
        folding: Fields of `ParallelFolding` by name.
        micro_batch_size: Sequences of a microbatch; None if not given.
        recompute: A key of `RECOMPUTE`; None if not given.
        gpus_multiple_of: What divides each number of GPUs that the given nodes can have.
    """

    folding: dict[str, Any] = field(default_factory=dict)
    micro_batch_size: int | None = None
    recompute: str | None = None
    gpus_multiple_of: int = 1

    def __call__(self, mapping: Mapping) -> bool:
        return (
            all(getattr(mapping.folding, name) == value for name, value in self.folding.items())
            and self.micro_batch_size in (None, mapping.micro_batch_size)
            and self.recompute in (None, mapping.recompute)
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that is given, by name."""
        others = {"micro_batch_size": self.micro_batch_size, "recompute": self.recompute}
        return self.folding | {name: value for name, value in others.items() if value is not None}

    def without(self, name: str) -> "Given":
        """Return the same with one setting left open."""
        if name in self.folding:
            return replace(self, folding={k: v for k, v in self.folding.items() if k != name})
        recompute = None if name == "recompute" else self.recompute
        batch = None if name == "micro_batch_size" else self.micro_batch_size
        return replace(self, micro_batch_size=batch, recompute=recompute)


def given_by(allowed: Allowed) -> Given:
    """Return the settings behind a condition; none behind a mere function."""
    return allowed if isinstance(allowed, Given) else Given()


def mappings_of(
    workload: Workload,
    world_size: int,
    hardware: Hardware,
    allowed: Allowed = everything,
) -> Iterator[list[Mapping]]:
    """Yield all mappings of a model on a number of GPUs.

    Args:
        workload: Model and batch.
        world_size: Number of GPUs.
        hardware: The GPUs, with the nodes of the job.
        allowed: Which mappings to consider.

    Yields:
        Groups of mappings that differ only in recompute, the least recompute first.
    """
    given = given_by(allowed)
    names: Iterable[str] = RECOMPUTE if workload.is_moe else ("none", "full")
    if given.recompute is not None:
        names = [given.recompute]
    batches = micro_batch_sizes(workload, given)
    for folding in foldings(workload, world_size, hardware, given):
        for micro_batch_size in batches:
            first = Mapping(folding, world_size, micro_batch_size)
            if not divides(first, workload.global_batch_size) or _in_vain(first, allowed):
                continue
            mappings = (Mapping(folding, world_size, micro_batch_size, name) for name in names)
            wanted = list(mappings if allowed is everything else filter(allowed, mappings))
            if wanted:
                yield wanted


def micro_batch_sizes(workload: Workload, given: Given) -> list[int]:
    """Return the microbatch sizes to try; the given size, if there is one.

    Args:
        workload: Model and batch.
        given: Settings that are kept.
    """
    if given.micro_batch_size is not None:
        return [given.micro_batch_size]
    longest = max(MICRO_BATCH_SIZES[-1], MOST_TOKENS // workload.seq_length)
    powers = (2**power for power in range(longest.bit_length()))
    return [size for size in powers if size <= workload.global_batch_size]


def divides(mapping: Mapping, global_batch_size: int) -> bool:
    """Return whether a batch divides into microbatches that the pipeline can schedule."""
    microbatches = mapping.microbatches(global_batch_size)
    virtual = mapping.folding.virtual_pipeline_model_parallel_size
    # Megatron interleaves groups of as many microbatches as there are stages.
    left = microbatches % mapping.folding.pipeline_model_parallel_size if virtual else 0
    return microbatches > 0 and left == 0


def _in_vain(mapping: Mapping, allowed: Allowed) -> bool:
    """Return whether half the context parallelism with half the microbatch is allowed too.

    That mapping makes the same pieces, with less communication.
    """
    cp = mapping.folding.context_parallel_size
    if cp % 2 or mapping.micro_batch_size % 2:
        return False
    if allowed is everything:
        return True
    if isinstance(allowed, Given):
        return "context_parallel_size" not in allowed.folding and allowed.micro_batch_size is None
    folding = replace(mapping.folding, context_parallel_size=cp // 2)
    half = replace(mapping, folding=folding, micro_batch_size=mapping.micro_batch_size // 2)
    return any(allowed(replace(half, recompute=name)) for name in RECOMPUTE)


def foldings(
    workload: Workload, world_size: int, hardware: Hardware, given: Given | None = None
) -> Iterator[ParallelFolding]:
    """Yield all foldings of a model; unless given, TP is inside a domain.

    Stages are as even as they can be: embedding and output layer count as layers only where the
    layers alone do not divide.

    Args:
        workload: Model and batch.
        world_size: Number of GPUs.
        hardware: The GPUs, with the nodes of the job.
        given: Settings that are kept.
    """
    sizes = _Sizes(workload, world_size, hardware, given or Given())
    stages = {pp: list(sizes.stages(pp)) for pp in sizes.pp()}
    expert = [
        (ep, etp)
        for ep, etp in product(sizes.of("ep", sizes.ep()), sizes.of("etp", sizes.etp()))
        if world_size % (ep * etp) == 0
    ]
    for tp, cp in product(sizes.of("tp", sizes.tp()), sizes.of("cp", sizes.cp())):
        # Megatron splits a sequence into two parts per context-parallel rank, then over TP.
        if world_size % (tp * cp) or workload.seq_length % (2 * cp * tp):
            continue
        for pp, ways in stages.items():
            if world_size % (tp * cp * pp):
                continue
            for ep, etp in expert:
                if world_size % (etp * ep * pp):
                    continue
                for way in ways:
                    yield ParallelFolding.of(tp=tp, cp=cp, pp=pp, ep=ep, etp=etp, **way)


@dataclass(frozen=True)
class _Sizes:
    """Sizes that fit a model, each by itself."""

    workload: Workload
    world_size: int
    hardware: Hardware
    given: Given

    def of(self, short: str, sizes: Iterable[int]) -> list[int]:
        """Return the sizes of one kind that fit the model; the given size, if there is one."""
        name = ParallelFolding.NAMES[short]
        chosen = [self.given.folding[name]] if name in self.given.folding else sizes
        return [size for size in chosen if self._fits(**{short: size})]

    def _fits(self, **fields: Any) -> bool:
        try:
            validate(self.workload.arch, self.workload.upcycling, ParallelFolding.of(**fields))
        except UpcyclingError:
            return False
        return True

    def tp(self) -> list[int]:
        return [size for size in SIZES if size <= self.hardware.nvlink_domain]

    def cp(self) -> list[int]:
        longest = max(self.hardware.nvlink_domain, self.workload.seq_length // FEWEST_TOKENS)
        powers = [2**power for power in range(longest.bit_length())]
        return [
            size for size in powers
            if size in self.tp() or size * FEWEST_TOKENS <= self.workload.seq_length
        ]  # fmt: skip

    def ep(self) -> list[int]:
        experts = self.workload.upcycling.num_moe_experts or 1
        return [size for size in range(1, experts + 1) if experts % size == 0]

    def etp(self) -> list[int]:
        return self.tp() if self.workload.is_moe else [1]

    def pp(self) -> list[int]:
        name = ParallelFolding.NAMES["pp"]
        layers = self.workload.arch.num_layers
        most = layers + len(ACCOUNTED_LAYERS)
        chosen = [self.given.folding[name]] if name in self.given.folding else range(1, most + 1)
        return [size for size in chosen if self.world_size % size == 0]

    def stages(self, pp: int) -> Iterator[dict[str, Any]]:
        """Yield the ways to cut the layers into stages: uneven stages, and virtual stages."""
        uneven = self.uneven(pp)
        name = ParallelFolding.NAMES["vpp"]
        layers = self.workload.arch.num_layers
        most = (layers + len(ACCOUNTED_LAYERS)) // pp
        if any(uneven.get(name) for name in UNEVEN_STAGES):
            most = layers
        virtual: Iterable[int | None] = [None, *(range(2, most + 1) if pp > 1 else ())]
        if name in self.given.folding:
            virtual = [self.given.folding[name]]
        for vpp in virtual:
            if self._fits(pp=pp, vpp=vpp, **uneven):
                yield {"vpp": vpp, **uneven}

    def uneven(self, pp: int) -> dict[str, Any]:
        """Return how stages are uneven: as given, or so that the layers divide."""
        given = {name: self.given.folding[name] for name in STAGES if name in self.given.folding}
        layers = self.workload.arch.num_layers
        if given or layers % pp == 0:
            return given
        # The output layer takes more time than the embedding, so that it counts first.
        for counted in (ACCOUNTED_LAYERS[1:], ACCOUNTED_LAYERS):
            if (layers + len(counted)) % pp == 0:
                return dict.fromkeys(counted, True)
        return {}

"""Memory of a run on CPU: what a rank needs, and what this machine has."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_upcycle.planner.memory import memory
from nemo_upcycle.planner.workload import Mapping, Workload

GIB = 2**30

LIBRARIES = int(1.1 * GIB)
"""Bytes per rank of Python with NeMo, Lightning and Megatron imported. Measured: with a model of
0.5M parameters a rank has a peak of 0.96 GiB."""

SAVING = {True: 1.0, False: 2.0}
"""Copies of parameters and optimizer state that exist while a checkpoint is saved: by whether one
rank has all state of its experts, and then gathers nothing. Measured: SmolLM2-135M with 4 experts
in every third layer takes 4.2 GiB before and 6.6 GiB while saving, on one rank."""

WORKING = 2.0
"""Activations over those of fused GPU kernels: CPU keeps results between operations in fp32."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes per rank on CPU.

    Attributes:
        libraries: The imported libraries.
        state: Parameters, gradients and optimizer state.
        saving: Copies while a checkpoint is saved.
        activations: Activations, attention scores and temporary memory.
    """

    libraries: int
    state: int
    saving: float
    activations: float

    @property
    def total(self) -> float:
        """The sum: a process keeps the memory of activations while a checkpoint is saved."""
        return self.libraries + self.state + self.saving + self.activations


def host_memory(workload: Workload, mapping: Mapping) -> HostMemory:
    """Return the memory of the fullest rank on CPU.

    Args:
        workload: Model and batch.
        mapping: The parallel mapping; its microbatches must divide the batch.
    """
    gpu = memory(workload, mapping)
    has_experts = workload.upcycling.num_moe_experts is not None
    ranks = mapping.expert_gradient_ranks if has_experts else mapping.gradient_ranks
    return HostMemory(
        libraries=LIBRARIES,
        state=gpu.parameters + gpu.gradients + gpu.optimizer,
        saving=SAVING[ranks == 1] * (gpu.parameters + gpu.optimizer),
        activations=WORKING * (gpu.activations + gpu.working) + _scores(workload, mapping),
    )


def _scores(workload: Workload, mapping: Mapping) -> float:
    """Return the bytes of attention scores, which fused kernels do not keep: three in fp32."""
    folding, length = mapping.folding, workload.seq_length
    heads = workload.arch.num_attention_heads / folding.tensor_model_parallel_size
    each = 3 * 4 * heads * length**2 / folding.context_parallel_size * mapping.micro_batch_size
    layers = workload.arch.num_layers / folding.pipeline_model_parallel_size
    return each * (1 if mapping.recompute == "full" else layers)


def available(root: Path = Path("/")) -> int | None:
    """Return the bytes that processes of this machine or container can still get.

    Args:
        root: Where /proc and /sys are.

    Returns:
        The least of the kernel's estimate and of the control groups' limits; None if the system
        does not say.
    """
    return min(_sources(root), default=None)


def _sources(root: Path) -> Iterator[int]:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        groups = root / "sys/fs/cgroup"
        if not controllers:
            yield from _left(groups, path, ("memory.max", "memory.current", "inactive_file"))
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _left(groups / "memory", path, names)


def _left(groups: Path, path: str, names: tuple[str, str, str]) -> Iterator[int]:
    """Yield what each control group from a path up to the root leaves; files in cache can go."""
    limit, usage, cache = names
    below = groups / path.strip("/")
    for group in (below, *below.parents):
        most, used = _text(group / limit).strip(), _text(group / usage).strip()
        if most.isdecimal() and used.isdecimal():
            stat = dict(line.split() for line in _text(group / "memory.stat").splitlines())
            yield max(0, int(most) - int(used) + int(stat.get(cache, 0)))
        if group == groups:
            return


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

"""Which fractions of a data sheet training reaches: the planner's free parameters."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Efficiency:
    """Fractions of the hardware's data sheet, and the cost of routing.

    `benchmarks/planner.py` fits the first five to published runs, and leaves out runs in turn to
    measure how well the fit generalises. The others are set by hand.

    Attributes:
        gemm: Fraction of the peak for an infinitely large matrix multiplication.
        nvlink: Fraction of NVLink's bandwidth for collectives inside a domain. Higher than NCCL's
            own figure if tensor-parallel collectives overlap with matrix multiplications.
        network: Fraction of the network's bandwidth for collectives that leave a domain.
        expert_load_cv: Coefficient of variation of the tokens per expert in a layer.
        fsdp_bandwidth: Fraction of one GPU's network link for FSDP's collectives over all nodes.
        fsdp_overlap: Fraction of the computation that overlaps with FSDP's collectives.
        memory: Fraction of the memory bandwidth for norms, activations, permutation, optimizer.
        attention: Fraction of the peak for fused attention.
        layer_overhead: Seconds per microbatch that a GPU waits for its host around attention, and
            again in an MoE layer, where the dispatcher reads back the token counts.
        tile: Rows or columns whose cost equals the start of a matrix multiplication: the width of
            a tensor-core tile.
        latency: Seconds per collective, whatever the size.
    """

    gemm: float
    nvlink: float
    network: float
    expert_load_cv: float
    fsdp_bandwidth: float
    fsdp_overlap: float = 0.5
    memory: float = 0.75
    attention: float = 0.5
    layer_overhead: float = 1e-4
    tile: int = 128
    latency: float = 2e-5


CALIBRATED = Efficiency(
    gemm=0.653, nvlink=0.946, network=0.628, expert_load_cv=0.192, fsdp_bandwidth=0.999
)
"""Fitted to `benchmarks/published.py`; see benchmarks/results/2026-11-25-planner.md."""

"""How much of a data sheet a training gets: the planner's few free numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Efficiency:
    """Fractions of what the hardware's data sheet says, and what routing costs.

    The first five are fitted to published runs by `benchmarks/planner.py`, which leaves runs out in
    turn to say how well they carry over; the others are set.

    Attributes:
        gemm: Of the peak, of an endlessly large matrix product.
        nvlink: Of NVLink's bandwidth, of collectives inside a domain. Higher than NCCL's own
            figure where tensor-parallel collectives hide behind products.
        network: Of the network's bandwidth, of collectives that leave a domain.
        expert_load_cv: Standard deviation of the tokens of a layer's experts over their mean.
        fsdp_bandwidth: Of one GPU's network link, of FSDP's collectives over all nodes.
        fsdp_overlap: Part of the computation behind which they hide.
        memory: Of the memory's bandwidth, of norms, activations, permutation and optimizer.
        attention: Of the peak, of fused attention.
        layer_overhead: Seconds that a GPU waits for its host around attention, and again in an MoE
            layer, of a microbatch: the dispatcher reads the experts' token counts back.
        tile: Rows or columns of a matrix product that cost as much as starting it: the width of a
            tensor-core tile.
        latency: Seconds that a collective takes whatever its size.
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

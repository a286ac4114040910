"""Which fractions of a data sheet training reaches: the planner's free parameters."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Efficiency:
    """Fractions of the hardware's data sheet, and the costs of routing and of the host.

    `benchmarks/planner.py` fits those without a default to published runs, and leaves out runs in
    turn to measure how well the fit generalizes. The others are set by hand.

    Attributes:
        gemm: Fraction of the peak for an infinitely large matrix multiplication.
        nvlink: Fraction of NVLink's bandwidth for collectives inside a domain. Higher than NCCL's
            own figure if tensor-parallel collectives overlap with matrix multiplications.
        network: Fraction of the network's bandwidth for collectives that leave a domain.
        expert_load_cv: Coefficient of variation of the tokens per expert in a layer.
        host_layer: Seconds that a host takes to launch an MoE layer, forward and backward. A layer
            takes no less, however little there is to compute.
        host_sync: The same where the host reads the counts of tokens before it can go on.
        host_expert: Seconds per expert that a GPU holds in the layer.
        deduplicated: Fraction of the network's bandwidth for a dispatcher that sends a token once
            per node. DeepEP's own tables state 43 to 58 GB/s of 50.
        fp8: How many times as fast FP8 makes a layer's matrix products. So that two layers of Llama
            3 8B as E8T2 take on one H100 what they took (711 ms, dropless, tensor-wise).
        memory: Fraction of the memory bandwidth for norms, activations, permutation, optimizer.
        attention: Fraction of the peak for fused attention.
        tile: Rows or columns whose cost equals the start of a matrix multiplication: the width of
            a tensor-core tile.
        latency: Seconds per collective, whatever the size.
    """

    gemm: float
    nvlink: float
    network: float
    expert_load_cv: float
    host_layer: float
    host_sync: float
    host_expert: float = 2.5e-4
    deduplicated: float = 0.95
    fp8: float = 1.3
    memory: float = 0.75
    attention: float = 0.5
    tile: int = 128
    latency: float = 2e-5

    @property
    def even(self) -> "Efficiency":
        """The same if tokens are spread evenly over the experts."""
        return replace(self, expert_load_cv=0.0)


CALIBRATED = Efficiency(
    gemm=0.642,
    nvlink=0.944,
    network=0.667,
    expert_load_cv=0.0777,
    host_layer=5.26e-3,
    host_sync=7.26e-3,
)
"""Fitted to `benchmarks/published.py`; see benchmarks/results/2026-11-28-planner.md."""

ACCURACY = (
    "Predicted without the runs of the same model, 20 published runs with coarse experts have a "
    "median error of 4% and a largest error of 11%; 3 runs with narrow experts have 9% and 12%. "
    "15 runs that no fit saw have 3% and 16%."
)
"""What `benchmarks/planner.py` found of the planner's accuracy."""

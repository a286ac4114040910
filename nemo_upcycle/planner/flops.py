"""Floating-point operations of a model, as counted for model-FLOPs utilization (MFU).

Only matrix multiplications count, with two operations per multiply-add, and only the experts that
a token uses. A capacity factor below 1 always drops tokens; dropped work does not count. What a
higher capacity factor drops depends on the routing, and counts as done. Recomputed operations and
the router do not count. Backward is twice forward.
"""

from dataclasses import dataclass
from typing import Any

from nemo_upcycle.families import dimensions
from nemo_upcycle.families.fields import megatron_model
from nemo_upcycle.families.model import MoEModel


@dataclass(frozen=True)
class Flops:
    """Operations of a forward pass over one sequence.

    Attributes:
        projections: Queries, keys, values and the attention output.
        attention: Queries times keys, and weights times values, over the full square.
        causal_attention: The same without the masked part.
        feed_forward: Dense layers, each token's experts, and shared experts.
        output: The output layer.
    """

    projections: int
    attention: int
    causal_attention: float
    feed_forward: float
    output: int

    @property
    def training(self) -> float:
        """Forward and backward with causal attention, as by a kernel that skips the mask."""
        return 3 * (self.projections + self.causal_attention + self.feed_forward + self.output)

    @property
    def training_full_attention(self) -> float:
        """Forward and backward, with attention over the full square.

        Source: the convention of arXiv 2412.09952, including the paper's 462.8 TFLOP/s.
        """
        return 3 * (self.projections + self.attention + self.feed_forward + self.output)


def flops(model: MoEModel, seq_length: int, capacity_factor: float | None = None) -> Flops:
    """Count the operations of a forward pass over one sequence.

    Args:
        model: The MoE model.
        seq_length: Tokens per sequence.
        capacity_factor: Tokens per expert over the mean that are computed at most; None drops none.
    """
    done = min(1.0, capacity_factor or 1.0)
    arch, sizes = model.arch, dimensions(model.arch)
    hidden, queries = arch.hidden_size, sizes["queries"]
    attention = 4 * seq_length * seq_length * queries * arch.num_layers
    return Flops(
        projections=2 * hidden * (sizes["qkv"] + queries) * seq_length * arch.num_layers,
        attention=attention,
        causal_attention=attention * _seen(seq_length, arch.sliding_window),
        feed_forward=2 * hidden * _neurons(model, done) * (arch.fc1_rows + 1) * seq_length,
        output=2 * hidden * arch.vocab_size * seq_length,
    )


def flops_of_config(config: Any) -> Flops:
    """Count the operations of a forward pass over one sequence of a Megatron config."""
    model = megatron_model(vars(config))
    return flops(model, config.seq_length, config.moe_expert_capacity_factor)


def _seen(seq_length: int, window: int | None) -> float:
    """Return the fraction of the square that is attended to; one half without a window."""
    if window is None or window >= seq_length:
        return 0.5
    return window * (seq_length - window / 2) / seq_length**2


def _neurons(model: MoEModel, done: float) -> float:
    """Return the number of neurons that a token uses, summed over all layers.

    Args:
        model: The MoE model.
        done: Fraction of the tokens' assignments to experts that is computed.
    """
    dense = model.arch.ffn_hidden_size
    moe = done * model.topk * model.expert_width + model.shared_width
    return sum(moe if is_moe else dense for is_moe in model.is_moe)


def utilization(
    counted: Flops, sequences: int, seconds: float, gpus: int, peak_tflops: float | None
) -> dict[str, float]:
    """Return the metrics of a step.

    Args:
        counted: Operations per sequence.
        sequences: Global batch size.
        seconds: Duration of the step.
        gpus: GPUs of the job.
        peak_tflops: Peak of a GPU in TFLOP/s; None omits utilization.

    Returns:
        TFLOP/s per GPU, and fractions of the peak.
    """
    scale = sequences / (seconds * gpus) / 1e12
    values = {"tflops_per_gpu": counted.training * scale}
    if peak_tflops is not None:
        values["mfu"] = counted.training * scale / peak_tflops
        values["mfu_full_attention"] = counted.training_full_attention * scale / peak_tflops
    return values

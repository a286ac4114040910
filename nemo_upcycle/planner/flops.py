"""Floating-point operations of a model, as model-FLOPs utilisation counts them.

Multiplications of matrices alone, two operations a product, of the experts that a token uses; not
what recompute repeats, nor the router. Backward is twice forward.
"""

from dataclasses import dataclass

from nemo_upcycle.families import dimensions
from nemo_upcycle.families.model import MoEModel


@dataclass(frozen=True)
class Flops:
    """Operations of a forward pass over one sequence.

    Attributes:
        projections: Of queries, keys, values and the attention's output.
        attention: Of queries with keys, and of weights with values, over the whole square.
        causal_attention: The same, without what the mask hides.
        feed_forward: Of dense layers, of a token's experts and of shared experts.
        output: Of the output layer.
    """

    projections: int
    attention: int
    causal_attention: float
    feed_forward: int
    output: int

    @property
    def training(self) -> float:
        """Forward and backward, attention causal: what a kernel that skips the mask computes."""
        return 3 * (self.projections + self.causal_attention + self.feed_forward + self.output)

    @property
    def training_full_attention(self) -> float:
        """Forward and backward, attention over the whole square.

        Source: the convention of arXiv 2412.09952 (its 462.8 TFLOP/s are of this).
        """
        return 3 * (self.projections + self.attention + self.feed_forward + self.output)


def flops(model: MoEModel, seq_length: int) -> Flops:
    """Count the operations of a forward pass over one sequence.

    Args:
        model: What is computed.
        seq_length: Tokens of the sequence.
    """
    arch, sizes = model.arch, dimensions(model.arch)
    hidden, queries = arch.hidden_size, sizes["queries"]
    attention = 4 * seq_length * seq_length * queries * arch.num_layers
    return Flops(
        projections=2 * hidden * (sizes["qkv"] + queries) * seq_length * arch.num_layers,
        attention=attention,
        causal_attention=attention * _seen(seq_length, arch.sliding_window),
        feed_forward=2 * hidden * _neurons(model) * (arch.fc1_rows + 1) * seq_length,
        output=2 * hidden * arch.vocab_size * seq_length,
    )


def _seen(seq_length: int, window: int | None) -> float:
    """Return the share of the square that a token sees, half of it without a window."""
    if window is None or window >= seq_length:
        return 0.5
    return window * (seq_length - window / 2) / seq_length**2


def _neurons(model: MoEModel) -> int:
    """Return the neurons that a token uses in all layers."""
    dense = model.arch.ffn_hidden_size
    moe = model.topk * model.expert_width + (dense if model.has_shared_expert else 0)
    return sum(moe if is_moe else dense for is_moe in model.is_moe)

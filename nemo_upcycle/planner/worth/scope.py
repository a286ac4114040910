"""Where the scaling laws hold: the models and tokens of arXiv 2502.03009."""

from collections.abc import Iterator

from nemo_upcycle.families.model import MoEModel
from nemo_upcycle.planner.worth.law import LEAST_TOKENS, MOST_TOKENS, PARAMETERS
from nemo_upcycle.progress import scaled

EXPERTS, TOPK, GRANULARITY = 8, 2, 1
"""The paper's MoEs are Mixtral-like: experts as wide as the dense layer, in all layers."""


def short(count: float) -> str:
    """Return a count of tokens or parameters with three digits and a unit."""
    return scaled(count, 1000, ("", "K", "M", "B", "T"))


def outside(
    model: MoEModel, parameters: float, dense_tokens: float, tokens: float
) -> Iterator[str]:
    """Yield what is outside of the laws' range: the quantity, its value, and the range.

    Args:
        model: The MoE.
        parameters: N1.
        dense_tokens: D1.
        tokens: D2.
    """
    least, most = PARAMETERS
    if not least <= parameters <= most:
        yield (
            f"N1, the dense parameters without embeddings and output layer, is {short(parameters)};"
            f" the law was fitted from about {short(least)} to {short(most)}"
        )
    quantities = {"D1, the dense model's tokens,": dense_tokens, "D2, upcycling's tokens,": tokens}
    for name, value in quantities.items():
        if value < LEAST_TOKENS:
            yield f"{name} is {short(value)}; the law is not used below {short(LEAST_TOKENS)}"
        elif value > MOST_TOKENS:
            yield f"{name} is {short(value)}; the law was fitted up to {short(MOST_TOKENS)}"
    yield from _other_experts(model)


def _other_experts(model: MoEModel) -> Iterator[str]:
    arch = model.arch
    found = {
        "experts per layer": (model.num_experts, EXPERTS),
        "experts per token": (model.topk, TOPK),
        "granularity": (round(arch.ffn_hidden_size / model.expert_width), GRANULARITY),
        "MoE layers": (sum(model.is_moe), arch.num_layers),
    }
    for name, (value, fitted) in found.items():
        if value != fitted:
            every = f"all {fitted}" if name == "MoE layers" else str(fitted)
            yield f"{name}: {value}; the law was fitted for {every}"

"""Parse the names of Megatron's parameters."""

import re

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
EXPERT_BIAS = "mlp.router.expert_bias"
"""Megatron's name of the bias per expert, within a layer."""

_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")


def stored_name(name: str) -> str:
    """Return a parameter's name in checkpoints.

    The norm before a feed-forward layer is a separate parameter only before an MoE. In a dense
    layer, and in every checkpoint, the norm is fused into linear_fc1.
    """
    return name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")


def dense_name(name: str) -> str:
    """Return the dense parameter behind a parameter of the MoE, with `{layer}` as a placeholder.

    Experts come from the layer's feed-forward network.
    """
    name = stored_name(pattern_of(name)).replace(".mlp.experts.{expert}.", ".mlp.")
    return name.replace(".mlp.shared_experts.", ".mlp.")


def pattern_of(name: str) -> str:
    """Return a parameter's name with `{layer}` and `{expert}` as placeholders."""
    name = _LAYER.sub("decoder.layers.{layer}.", name)
    return _EXPERT.sub(".mlp.experts.{expert}.", name)


def expert_of(name: str) -> int | None:
    """Return the routed expert of a parameter; None if there is none."""
    match = _EXPERT.search(name)
    return int(match[1]) if match else None


def is_router(name: str) -> bool:
    """Return whether a parameter is a router's weight."""
    return name.endswith(".mlp.router.weight")


def is_expert_bias(name: str) -> bool:
    """Return whether a name is that of a router's expert bias, a buffer that is trained."""
    return name.endswith(f".{EXPERT_BIAS}")


def is_shared(name: str) -> bool:
    """Return whether a parameter belongs to a shared expert."""
    return ".mlp.shared_experts." in name


def layer_of(name: str) -> int | None:
    """Return the layer of a parameter; None if there is none."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None

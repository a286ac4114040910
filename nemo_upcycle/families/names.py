"""Parse the names of Megatron's parameters."""

import re

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
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


def layer_of(name: str) -> int | None:
    """Return the layer of a parameter; None if there is none."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None

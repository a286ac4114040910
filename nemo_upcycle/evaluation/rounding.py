"""The effect of rounding on a model, measured by changing the order of summation.

The order of hidden units and of feed-forward neurons is arbitrary. After a consistent permutation,
every product sums the same numbers in a different order. The output then differs by rounding alone,
amplified by the model's depth and weights.
"""

import torch

# Axis of the hidden units, by suffix of the parameter names of transformers and Megatron.
_HIDDEN = {
    "embed_tokens.weight": 1,
    "lm_head.weight": 1,
    "q_proj.weight": 1,
    "k_proj.weight": 1,
    "v_proj.weight": 1,
    "o_proj.weight": 0,
    "gate_proj.weight": 1,
    "up_proj.weight": 1,
    "down_proj.weight": 0,
    "input_layernorm.weight": 0,
    "input_layernorm.bias": 0,
    "post_attention_layernorm.weight": 0,
    "post_attention_layernorm.bias": 0,
    "model.norm.weight": 0,
    "model.norm.bias": 0,
    "word_embeddings.weight": 1,
    "output_layer.weight": 1,
    "linear_qkv.weight": 1,
    "linear_proj.weight": 0,
    "linear_fc1.weight": 1,
    "linear_fc2.weight": 0,
    "layer_norm_weight": 0,
    "layer_norm_bias": 0,
    "final_layernorm.weight": 0,
    "final_layernorm.bias": 0,
}
# Axis of the neurons.
_NEURONS = {
    "gate_proj.weight": 0,
    "up_proj.weight": 0,
    "down_proj.weight": 1,
    "linear_fc1.weight": 0,
    "linear_fc2.weight": 1,
}


@torch.no_grad()
def reorder(dense: torch.nn.Module, hidden_size: int) -> None:
    """Permute the hidden units and the neurons of a dense model in place.

    Every rank permutes its shards alike: no mapping splits hidden units, and neurons stay on one
    rank.

    Args:
        dense: A model of transformers or Megatron; the permutation keeps the model's function.
        hidden_size: Number of hidden units.
    """
    parameters = dict(dense.named_parameters())
    units = _permutation(hidden_size)
    # Gate and up are one parameter if there is a gate.
    widths = [p.shape[1] for name, p in parameters.items() if name.endswith("linear_fc2.weight")]
    for name, parameter in parameters.items():
        if (axis := _axis(_HIDDEN, name)) is not None:
            _permute(parameter, axis, units)
        if (axis := _axis(_NEURONS, name)) is not None:
            width = widths[0] if name.endswith("linear_fc1.weight") else parameter.shape[axis]
            neurons = _permutation(width)
            parts = range(0, parameter.shape[axis], width)
            _permute(parameter, axis, torch.cat([neurons + start for start in parts]))


def _permute(parameter: torch.Tensor, axis: int, order: torch.Tensor) -> None:
    parameter.copy_(parameter.index_select(axis, order.to(parameter.device)))


def _axis(table: dict[str, int], name: str) -> int | None:
    return next((axis for ending, axis in table.items() if name.endswith(ending)), None)


def _permutation(size: int) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(size))

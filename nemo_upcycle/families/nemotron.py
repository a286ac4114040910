"""Nemotron-3, Nemotron-4 and Minitron (`NemotronForCausalLM`), upcycled in arXiv 2410.07524.

Squared ReLU without a gate: a neuron is a row of up and a column of down. Norms are LayerNorms
whose weight is stored minus 1. RoPE rotates only a part of each head.
"""

from dataclasses import replace
from functools import partial

from nemo_upcycle.families.family import Operation, Rename, UpMLP
from nemo_upcycle.families.huggingface import read_architecture
from nemo_upcycle.families.llama import LAYER, LLAMA, MEGATRON_LAYER, MLP

NORM_BIASES: dict[str, Operation] = {
    MEGATRON_LAYER + "self_attention.linear_qkv.layer_norm_bias": Rename(
        LAYER + "input_layernorm.bias"
    ),
    MEGATRON_LAYER + "mlp.linear_fc1.layer_norm_bias": Rename(
        LAYER + "post_attention_layernorm.bias"
    ),
    "decoder.final_layernorm.bias": Rename("model.norm.bias"),
}
"""What LayerNorm has beside RMSNorm."""

NORM_BIAS_SHAPES = {
    LAYER + "input_layernorm.bias": ("hidden",),
    LAYER + "post_attention_layernorm.bias": ("hidden",),
    "model.norm.bias": ("hidden",),
}

NEMOTRON = replace(
    LLAMA,
    model_type="nemotron",
    architecture=partial(read_architecture, family="nemotron"),
    parameters={
        **LLAMA.parameters,
        **NORM_BIASES,
        MEGATRON_LAYER + "mlp.linear_fc1.weight": UpMLP(MLP + "up_proj.weight"),
    },
    tensors={
        **{name: axes for name, axes in LLAMA.tensors.items() if "gate_proj" not in name},
        **NORM_BIAS_SHAPES,
    },
)

"""Nemotron-3, Nemotron-4 and Minitron (`NemotronForCausalLM`), what arXiv 2410.07524 upcycled.

Squared ReLU without a gate: a neuron is a row of up and a column of down. Norms are LayerNorms
whose weight is stored less 1, and a part of each head is rotated.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_upcycle.mapping.family import Architecture, Rename, UpMLP
from nemo_upcycle.mapping.huggingface import read_architecture
from nemo_upcycle.mapping.llama import LAYER, LLAMA, MEGATRON_LAYER, MLP

EXPECTED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "relu2"}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read the numbers of a Nemotron `config.json`; see `read_architecture`."""
    return read_architecture(
        config,
        EXPECTED,
        activation="squared_relu",
        normalization="LayerNorm1p",
        layernorm_epsilon=config.get("norm_eps", 1e-5),
        rotary_percent=config.get("partial_rotary_factor", 0.5),
    )


NEMOTRON = replace(
    LLAMA,
    model_type="nemotron",
    architecture=architecture,
    parameters={
        **LLAMA.parameters,
        MEGATRON_LAYER + "self_attention.linear_qkv.layer_norm_bias": Rename(
            LAYER + "input_layernorm.bias"
        ),
        MEGATRON_LAYER + "mlp.linear_fc1.layer_norm_bias": Rename(
            LAYER + "post_attention_layernorm.bias"
        ),
        MEGATRON_LAYER + "mlp.linear_fc1.weight": UpMLP(MLP + "up_proj.weight"),
        "decoder.final_layernorm.bias": Rename("model.norm.bias"),
    },
    tensors={
        **{name: axes for name, axes in LLAMA.tensors.items() if "gate_proj" not in name},
        LAYER + "input_layernorm.bias": ("hidden",),
        LAYER + "post_attention_layernorm.bias": ("hidden",),
        "model.norm.bias": ("hidden",),
    },
)

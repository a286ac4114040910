"""Qwen3 (`Qwen3ForCausalLM`): a Llama that normalises every head's query and key."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_upcycle.mapping.family import Architecture, Rename
from nemo_upcycle.mapping.huggingface import read_architecture
from nemo_upcycle.mapping.llama import ATTENTION, LLAMA, MEGATRON_LAYER

EXPECTED = {"attention_bias": False, "hidden_act": "silu", "use_sliding_window": False}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read the numbers of a Qwen3 `config.json`; see `read_architecture`."""
    head = config.get("head_dim") or 128  # transformers' own default
    return read_architecture(config, EXPECTED, qk_layernorm=True, kv_channels=head)


QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    architecture=architecture,
    parameters={
        **LLAMA.parameters,
        MEGATRON_LAYER + "self_attention.q_layernorm.weight": Rename(ATTENTION + "q_norm.weight"),
        MEGATRON_LAYER + "self_attention.k_layernorm.weight": Rename(ATTENTION + "k_norm.weight"),
    },
    tensors={
        **LLAMA.tensors,
        ATTENTION + "q_norm.weight": ("head",),
        ATTENTION + "k_norm.weight": ("head",),
    },
)

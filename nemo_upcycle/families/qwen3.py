"""Qwen3 (`Qwen3ForCausalLM`): a Llama that normalizes every head's query and key."""

from dataclasses import replace
from functools import partial

from nemo_upcycle.families.family import Rename
from nemo_upcycle.families.huggingface import read_architecture
from nemo_upcycle.families.llama import ATTENTION, LLAMA, MEGATRON_LAYER

QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    architecture=partial(read_architecture, family="qwen3", qk_layernorm=True),
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

"""Qwen2 and Qwen2.5 (`Qwen2ForCausalLM`): a Llama with biases on queries, keys and values."""

from dataclasses import replace
from functools import partial

from nemo_upcycle.families.family import QKV
from nemo_upcycle.families.huggingface import read_architecture
from nemo_upcycle.families.llama import ATTENTION, LLAMA, MEGATRON_LAYER

QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    architecture=partial(read_architecture, family="qwen2", add_qkv_bias=True),
    parameters={
        **LLAMA.parameters,
        MEGATRON_LAYER + "self_attention.linear_qkv.bias": QKV(
            ATTENTION + "q_proj.bias", ATTENTION + "k_proj.bias", ATTENTION + "v_proj.bias"
        ),
    },
    tensors={
        **LLAMA.tensors,
        ATTENTION + "q_proj.bias": ("queries",),
        ATTENTION + "k_proj.bias": ("keys",),
        ATTENTION + "v_proj.bias": ("keys",),
    },
)

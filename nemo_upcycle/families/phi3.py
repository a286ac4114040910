"""Phi-3 of 4,096 tokens and Phi-4 (`Phi3ForCausalLM`): a Llama with fused tensors.

Queries, keys and values are one tensor, and so are gate and up. RoPE may rotate a part of a head.
The models of 128k tokens have LongRoPE, which is refused.
"""

from dataclasses import replace
from functools import partial

from nemo_upcycle.families.family import QKV, GatedMLP
from nemo_upcycle.families.huggingface import read_architecture
from nemo_upcycle.families.llama import ATTENTION, LLAMA, MEGATRON_LAYER, MLP

_QKV, _GATE_UP = ATTENTION + "qkv_proj.weight", MLP + "gate_up_proj.weight"
_APART = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")

PHI3 = replace(
    LLAMA,
    model_type="phi3",
    architecture=partial(read_architecture, family="phi3"),
    parameters={
        **LLAMA.parameters,
        MEGATRON_LAYER + "self_attention.linear_qkv.weight": QKV(_QKV, _QKV, _QKV),
        MEGATRON_LAYER + "mlp.linear_fc1.weight": GatedMLP(_GATE_UP, _GATE_UP),
    },
    tensors={
        **{name: axes for name, axes in LLAMA.tensors.items() if name.split(".")[-2] not in _APART},
        _QKV: ("qkv", "hidden"),
        _GATE_UP: ("fc1", "hidden"),
    },
)

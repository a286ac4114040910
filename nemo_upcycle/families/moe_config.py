"""Read an MoE from a Hugging Face `config.json`: the inverse of `MoEFamily.config`."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.huggingface import read_architecture
from nemo_upcycle.families.model import MoEModel
from nemo_upcycle.families.moe import (
    GLM4_MOE,
    GRANITE_MOE,
    GRANITE_MOE_SHARED,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
)
from nemo_upcycle.families.moe_family import MoEFamily
from nemo_upcycle.families.unfit import MOE, feature_of
from nemo_upcycle.families.values import MOST_LISTED, Values, unfit

MOE_FAMILIES: dict[str, MoEFamily] = {
    family.model_type: family
    for family in (MIXTRAL, QWEN2_MOE, QWEN3_MOE, GLM4_MOE, GRANITE_MOE, GRANITE_MOE_SHARED)
}


def moe_model(config: Mapping[str, Any]) -> MoEModel:
    """Read an MoE's description.

    Args:
        config: The parsed `config.json`, in the format of transformers 4 or 5.

    Raises:
        UpcyclingError: The family is not supported, a value has the wrong type, or transformers or
            Megatron cannot compute the model.
    """
    kind = str(config.get("model_type"))
    if kind not in MOE_FAMILIES:
        raise UpcyclingError(
            f"config.json says model_type={kind!r}; MoE families that can be read: "
            f"{', '.join(MOE_FAMILIES)}." + feature_of(kind, MOE)
        )
    own = {"mixtral": _mixtral, "glm4_moe": _glm4}
    family = _granite if kind.startswith("granite") else _qwen
    model = own.get(kind, partial(family, kind=kind))(config)
    if model.topk > model.num_experts:
        raise UpcyclingError(
            f"config.json says num_experts_per_tok={model.topk} of {model.num_experts} experts; "
            "expected no more than there are."
        )
    if model.topk == 1 and model.score_function == "softmax" and not model.pre_softmax:
        raise UpcyclingError(
            "config.json gives each token one expert with a weight of 1, whatever the router says; "
            "Megatron's router computes one expert only with its weight of all."
        )
    return model


def _mixtral(config: Mapping[str, Any]) -> MoEModel:
    values, arch = Values(config, "mixtral"), read_architecture(config, "mixtral")
    return MoEModel(
        arch=arch,
        num_experts=values.count("num_local_experts", most=MOST_LISTED),
        topk=values.count("num_experts_per_tok"),
        pre_softmax=False,
        # The dense width of a granular model is not recorded; no layer has that width.
        expert_width=arch.ffn_hidden_size,
        is_moe=(True,) * arch.num_layers,
    )


def _granite(config: Mapping[str, Any], kind: str) -> MoEModel:
    values, arch = Values(config, kind), read_architecture(config, kind)
    _check_heads(arch.num_attention_heads * arch.kv_channels, arch.hidden_size, "Granite-MoE")
    shared = values.count("shared_intermediate_size", least=0) if kind != "granitemoe" else 0
    return MoEModel(
        # A shared expert is as wide as the dense layer was; without one, the width is not recorded.
        arch=replace(arch, ffn_hidden_size=shared or arch.ffn_hidden_size),
        num_experts=values.count("num_local_experts", most=MOST_LISTED),
        topk=values.count("num_experts_per_tok"),
        pre_softmax=False,
        expert_width=arch.ffn_hidden_size,
        is_moe=(True,) * arch.num_layers,
        shared_width=shared,
    )


def _qwen(config: Mapping[str, Any], kind: str) -> MoEModel:
    values = Values(config, kind)
    if kind == "qwen3_moe":
        arch, shared = read_architecture(config, kind, qk_layernorm=True), 1
    else:
        arch = read_architecture(config, kind, add_qkv_bias=values.flag("qkv_bias"))
        shared = values.count("shared_expert_intermediate_size")
        _check_heads(arch.num_attention_heads * arch.kv_channels, arch.hidden_size, "Qwen2-MoE")
    if shared > arch.ffn_hidden_size:
        raise UpcyclingError(
            f"config.json says shared_expert_intermediate_size={shared}; expected at most the "
            f"dense layer's width, {arch.ffn_hidden_size}, or 1, which is none."
        )
    return MoEModel(
        arch=arch,
        num_experts=values.count("num_experts", most=MOST_LISTED),
        topk=values.count("num_experts_per_tok"),
        pre_softmax=not values.flag("norm_topk_prob"),
        expert_width=values.count("moe_intermediate_size"),
        is_moe=_moe_layers(values, arch.num_layers),
        shared_width=0 if shared == 1 else shared,
    )


def _glm4(config: Mapping[str, Any]) -> MoEModel:
    """Read a GLM-4-MoE; the bias of the experts is part of the architecture."""
    values = Values(config, "glm4_moe")
    arch = read_architecture(
        config,
        "glm4_moe",
        add_qkv_bias=values.flag("attention_bias"),
        qk_layernorm=values.flag("use_qk_norm"),
    )
    topk, width = values.count("num_experts_per_tok"), values.count("moe_intermediate_size")
    fixed = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1}
    for key, expected in (fixed | {"norm_topk_prob": topk > 1}).items():
        if values.said[key] != expected:
            raise unfit(key, values.said[key], f"{expected!r}: only that can be read")
    first = values.count("first_k_dense_replace", least=0)
    if first >= arch.num_layers:
        raise UpcyclingError(
            f"config.json says first_k_dense_replace={first}, which leaves none of "
            f"{arch.num_layers} layers with experts; expected one at least."
        )
    return MoEModel(
        arch=arch,
        num_experts=values.count("n_routed_experts", least=2, most=MOST_LISTED),
        topk=topk,
        pre_softmax=False,
        expert_width=width,
        is_moe=tuple(layer >= first for layer in range(arch.num_layers)),
        shared_width=values.count("n_shared_experts", least=0, most=MOST_LISTED) * width,
        score_function="sigmoid",
        has_expert_bias=True,
    )


def _check_heads(heads: int, hidden: int, kind: str) -> None:
    if heads != hidden:
        raise UpcyclingError(
            f"config.json makes attention heads of {heads} numbers together of a hidden size of "
            f"{hidden}; a {kind} of transformers 4 has as many."
        )


def _moe_layers(values: Values, layers: int) -> tuple[bool, ...]:
    step, dense = values.count("decoder_sparse_step"), values.said["mlp_only_layers"]
    if not isinstance(dense, list | None):
        raise unfit("mlp_only_layers", dense, "a list of layers, or null")
    is_moe = tuple(
        layer not in (dense or ()) and (layer + 1) % step == 0 for layer in range(layers)
    )
    if not any(is_moe):
        raise UpcyclingError(
            f"config.json says decoder_sparse_step={step} and mlp_only_layers={dense}, which "
            f"leave none of {layers} layers with experts; expected one at least."
        )
    return is_moe

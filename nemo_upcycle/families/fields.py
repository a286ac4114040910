"""Convert models to the fields of Megatron's configs, and back.

Functions are given by name, such as `squared_relu`: a front end maps names to functions.
"""

import math
from collections.abc import Mapping
from typing import Any

from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.config.layers import megatron_layer_freq, moe_layers
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.family import ACTIVATIONS, Architecture
from nemo_upcycle.families.megatron import MEGATRON_NORMS, moe_architecture
from nemo_upcycle.families.model import (
    Experts,
    MoEModel,
    experts_of,
    no_experts,
    upcycling_of,
    with_experts,
)
from nemo_upcycle.families.rope import scaling_fields

ROUTER_FIELDS: dict[str, Any] = {
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_topk_limited_devices": None,
    "moe_apply_probs_on_input": False,
}
"""Megatron's fields that change what a router computes, with the values of upcycling.

Score function and expert bias are not among them: `UpcyclingConfig` has both.
"""

SCORE_FUNCTIONS = ("softmax", "sigmoid")
"""Score functions that upcycled models have; newer versions of Megatron-Core have more."""

LOGIT_NORMALIZATION, DENSE_GRADIENT = "router_logit_normalization", "router_dense_gradient"
"""The fields of experts that Megatron's own configs do not have."""

_OF_TRAINING = (
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_router_bias_update_rate",
    "moe_expert_capacity_factor",
    "moe_pad_expert_input_to_capacity",
    "moe_token_dispatcher_type",
)
"""Fields of training that `UpcyclingConfig` shares with Megatron's config."""


def architecture_fields(arch: Architecture) -> dict[str, Any]:
    """Return the fields that a dense model determines.

    Args:
        arch: The dense model's architecture.

    Returns:
        Values by field, without those that are as in a Llama. RoPE scaling is in fields that
        Megatron's configs do not have (`families.rope`), and so are multipliers.
    """
    values: dict[str, Any] = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.kv_channels,
        "vocab_size": arch.vocab_size,
        "layernorm_epsilon": arch.layernorm_epsilon,
        "rotary_base": arch.rotary_base,
        "share_embeddings_and_output_weights": arch.share_embeddings_and_output_weights,
        "init_method_std": arch.init_method_std,
    }
    values |= scaling_fields(arch.rope_scaling)
    activation = ACTIVATIONS[arch.activation]
    if arch.activation != "swiglu":
        values |= {
            "activation_func": activation.function,
            "gated_linear_unit": activation.is_gated,
            "bias_activation_fusion": False,  # a kernel for SwiGLU and GeLU
        }
    if arch.normalization != "RMSNorm":
        kind, adds_one = MEGATRON_NORMS[arch.normalization]
        values |= {"normalization": kind, "layernorm_zero_centered_gamma": adds_one}
    unusual = {
        "add_qkv_bias": (arch.add_qkv_bias, False),
        "qk_layernorm": (arch.qk_layernorm, False),
        "rotary_percent": (arch.rotary_percent, 1.0),
        "seq_len_interpolation_factor": (arch.seq_len_interpolation_factor, None),
        "softmax_scale": (arch.softmax_scale, None),
        "no_rope_freq": (_no_rope_freq(arch), None),
        **{name: (value, 1.0) for name, value in arch.multipliers.items()},
    }
    return values | {name: value for name, (value, usual) in unusual.items() if value != usual}


def _no_rope_freq(arch: Architecture) -> list[int] | None:
    """Return a 1 for each layer without RoPE and a 0 for each other, or None if all rotate."""
    if not arch.nope_layers:
        return None
    return [int(layer in arch.nope_layers) for layer in range(arch.num_layers)]


def window_fields(arch: Architecture, seq_length: int | None = None) -> dict[str, Any]:
    """Return the field for a sliding window, if sequences are longer than the window.

    Megatron counts only the tokens before a token; the dense model's config also the token.

    Args:
        arch: The dense model's architecture.
        seq_length: Maximum tokens per sequence; None for no limit.
    """
    if arch.sliding_window is None or (seq_length or math.inf) <= arch.sliding_window:
        return {}
    return {"window_size": (arch.sliding_window - 1, 0)}


def experts_fields(experts: Experts) -> dict[str, Any]:
    """Return the fields that describe the experts."""
    if not any(experts.is_moe):
        return {"num_moe_experts": None}
    normalization = experts.logit_normalization
    return {
        **({} if normalization is None else {LOGIT_NORMALIZATION: normalization}),
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.topk,
        "moe_router_pre_softmax": experts.pre_softmax,
        "moe_ffn_hidden_size": experts.expert_width,
        "moe_layer_freq": megatron_layer_freq(experts.is_moe, len(experts.is_moe)),
        "moe_shared_expert_intermediate_size": experts.shared_width or None,
        "moe_router_score_function": experts.score_function,
        "moe_router_enable_expert_bias": experts.has_expert_bias,
    }


def moe_fields(arch: Architecture, upcycling: UpcyclingConfig) -> dict[str, Any]:
    """Return the fields that the upcycling of a dense model determines."""
    values = experts_fields(experts_of(upcycling, arch.num_layers, arch.ffn_hidden_size))
    if upcycling.num_moe_experts is None:
        return values
    if upcycling.router_dense_gradient:
        values[DENSE_GRADIENT] = True
    return values | {name: getattr(upcycling, name) for name in _OF_TRAINING}


def experts_in(config: Mapping[str, Any]) -> Experts:
    """Read the experts from a config: the inverse of `experts_fields`.

    Args:
        config: Values by field; `ffn_hidden_size` is the dense layer's width.

    Raises:
        UpcyclingError: The router has another score function, or the shared expert is wider than
            the dense layer.
    """
    dense_width, layers = config["ffn_hidden_size"], config["num_layers"]
    if not config.get("num_moe_experts"):
        return no_experts(layers, dense_width)
    shared = config.get("moe_shared_expert_intermediate_size") or 0
    if shared > dense_width:
        raise UpcyclingError(
            f"moe_shared_expert_intermediate_size is {shared}; a shared expert is the dense "
            f"feed-forward layer, {dense_width} wide, or a part of the layer."
        )
    score_function = config.get("moe_router_score_function") or "softmax"
    if score_function not in SCORE_FUNCTIONS:
        raise UpcyclingError(
            f"moe_router_score_function is {score_function!r}; expected one of: "
            f"{', '.join(SCORE_FUNCTIONS)}."
        )
    return Experts(
        num_experts=config["num_moe_experts"],
        topk=config.get("moe_router_topk", 2),
        pre_softmax=bool(config.get("moe_router_pre_softmax")),
        expert_width=config.get("moe_ffn_hidden_size") or dense_width,
        is_moe=moe_layers(config.get("moe_layer_freq") or 1, layers),
        shared_width=shared,
        score_function=score_function,
        has_expert_bias=bool(config.get("moe_router_enable_expert_bias")),
        logit_normalization=config.get(LOGIT_NORMALIZATION),
    )


def upcycling_in(config: Any, **chosen: Any) -> UpcyclingConfig:
    """Read the upcycling from a model's config: the inverse of `moe_fields`.

    Args:
        config: A config of NeMo or Megatron; `ffn_hidden_size` is the dense layer's width.
        chosen: Values that the config does not have: initializer, scaling, seed.

    Raises:
        UpcyclingError: Upcycling cannot make these experts.
    """
    if config.num_moe_experts is not None:
        chosen |= {name: getattr(config, name) for name in _OF_TRAINING}
        chosen[DENSE_GRADIENT] = getattr(config, DENSE_GRADIENT, False)
    return upcycling_of(experts_in(vars(config)), config.ffn_hidden_size, **chosen)


def megatron_model(config: Mapping[str, Any]) -> MoEModel:
    """Return the model of a config with Megatron's names.

    Raises:
        UpcyclingError: A number is missing, or upcycling cannot make this model.
    """
    other = {
        name: config[name]
        for name, usual in ROUTER_FIELDS.items()
        if config.get(name, usual) != usual
    }
    if config.get("num_moe_experts") and other:
        said = ", ".join(f"{name}={value!r}" for name, value in other.items())
        raise UpcyclingError(
            f"The checkpoint's config says {said}; expected a router "
            "with softmax or sigmoid and top-k alone."
        )
    return with_experts(moe_architecture(config), experts_in(config))

"""Dense Llamas with Megatron's own names: NeMo 2 and Megatron-LM checkpoints."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.family import (
    Architecture,
    DownMLP,
    Family,
    GatedMLP,
    Operation,
    Rename,
)
from nemo_upcycle.families.llama import MEGATRON_LAYER
from nemo_upcycle.families.llama import PARAMETERS as LLAMA_PARAMETERS
from nemo_upcycle.families.values import LARGEST_SIZE, MOST_LISTED, is_positive, shown

_ATTENTION = MEGATRON_LAYER + "self_attention."
_MLP = MEGATRON_LAYER + "mlp."

PARAMETERS: dict[str, Operation] = {name: Rename(name) for name in LLAMA_PARAMETERS} | {
    _MLP + "linear_fc1.weight": GatedMLP(_MLP + "linear_fc1.weight", _MLP + "linear_fc1.weight"),
    _MLP + "linear_fc2.weight": DownMLP(_MLP + "linear_fc2.weight"),
}

TENSORS: dict[str, tuple[str, ...]] = {
    "embedding.word_embeddings.weight": ("vocab", "hidden"),
    _ATTENTION + "linear_qkv.layer_norm_weight": ("hidden",),
    _ATTENTION + "linear_qkv.weight": ("qkv", "hidden"),
    _ATTENTION + "linear_proj.weight": ("hidden", "queries"),
    _MLP + "linear_fc1.layer_norm_weight": ("hidden",),
    _MLP + "linear_fc1.weight": ("fc1", "hidden"),
    _MLP + "linear_fc2.weight": ("hidden", "ffn"),
    "decoder.final_layernorm.weight": ("hidden",),
    "output_layer.weight": ("vocab", "hidden"),
}

LLAMA_FIELDS: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "seq_len_interpolation_factor": None,
    "no_rope_freq": None,
    "window_size": None,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "multi_latent_attention": False,
    "mtp_num_layers": None,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "heterogeneous_block_specs": False,
    "is_hybrid_model": False,
}
"""Megatron's fields of a Llama; also assumed for fields that are not recorded."""

ROPE_SCALING_FIELDS = {
    "scale_factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "old_context_len": "original_max_position_embeddings",
}
"""NeMo's names of Llama 3.1's RoPE scaling, and Hugging Face's."""

MEGATRON_ROPE_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
"""What Megatron-Core's own RoPE scaling is, beside its factor; NeMo's names."""


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read the architecture of a dense Llama from a config with Megatron's field names.

    Raises:
        UpcyclingError: A number is missing, or the model is an MoE or no Llama.
    """
    _check_llama(config)
    heads = _count(config, "num_attention_heads")
    hidden_size = _count(config, "hidden_size")
    arch = Architecture(
        num_layers=_count(config, "num_layers", most=MOST_LISTED),
        hidden_size=hidden_size,
        ffn_hidden_size=_count(config, "ffn_hidden_size"),
        num_attention_heads=heads,
        num_query_groups=_count(config, "num_query_groups", heads),
        kv_channels=_count(config, "kv_channels", hidden_size // max(1, heads)),
        vocab_size=_count(config, "vocab_size"),
        max_position_embeddings=_count(
            config, "max_position_embeddings", config.get("seq_length") or 4096
        ),
        layernorm_epsilon=_number(config, "layernorm_epsilon", 1e-5),
        rotary_base=_number(config, "rotary_base", 10000.0),
        rope_scaling=_rope_scaling(config),
        share_embeddings_and_output_weights=bool(
            config.get("share_embeddings_and_output_weights", False)
        ),
        init_method_std=_number(config, "init_method_std", 0.02),
    )
    if not 0 < arch.num_query_groups <= heads or heads % arch.num_query_groups:
        raise UpcyclingError(
            f"The dense checkpoint's config says {heads} attention heads and "
            f"{arch.num_query_groups} query groups; expected the second to divide the first."
        )
    return arch


def moe_architecture(config: Mapping[str, Any]) -> Architecture:
    """Read the architecture of an upcycled model of any supported family.

    Raises:
        UpcyclingError: A number is missing, or the family is not supported.
    """
    window, interpolation = (
        config.get(name) for name in ("window_size", "seq_len_interpolation_factor")
    )
    gated = config.get("gated_linear_unit", True)
    norm = config.get("normalization", "RMSNorm")
    as_llama = {
        **config,
        **{name: LLAMA_FIELDS[name] for name in _OF_FAMILIES},
        "num_moe_experts": None,
        "activation_func": "silu",
    }
    dense = architecture(as_llama)
    return replace(
        dense,
        rotary_base=float(dense.rotary_base),  # Megatron-LM's arguments have an integer
        activation="swiglu" if gated else "squared_relu",
        normalization="RMSNorm" if norm == "RMSNorm" else "LayerNorm1p",
        add_qkv_bias=bool(config.get("add_qkv_bias")),
        qk_layernorm=bool(config.get("qk_layernorm")),
        rotary_percent=_number(config, "rotary_percent", 1.0),
        seq_len_interpolation_factor=(
            None if interpolation is None else _number(config, "seq_len_interpolation_factor")
        ),
        sliding_window=None if window is None else window[0] + 1,
    )


_OF_FAMILIES = (
    "normalization",
    "gated_linear_unit",
    "add_qkv_bias",
    "qk_layernorm",
    "layernorm_zero_centered_gamma",
    "rotary_percent",
    "seq_len_interpolation_factor",
    "window_size",
)
"""Fields of `LLAMA_FIELDS` in which the families that can be upcycled differ."""


def _check_llama(config: Mapping[str, Any]) -> None:
    experts = config.get("num_moe_experts")
    if experts is not None:
        raise UpcyclingError(
            f"The dense checkpoint's config says num_moe_experts={experts}: it is an MoE already. "
            "Give a dense checkpoint; to train this one on, resume from it."
        )
    activation = config.get("activation_func", "silu")
    if str(activation).rpartition(".")[2] != "silu":
        raise _unsupported("activation_func", activation, "silu")
    for name, expected in LLAMA_FIELDS.items():
        if config.get(name, expected) != expected:
            raise _unsupported(name, config[name], expected)


def _unsupported(name: str, found: object, expected: object) -> UpcyclingError:
    return UpcyclingError(
        f"The dense checkpoint's config says {name}={found!r}; only {expected!r} can be upcycled."
    )


def _rope_scaling(config: Mapping[str, Any]) -> dict[str, float] | None:
    if config.get("scale_factor") is None:
        return None
    return {ours: _number(config, field) for field, ours in ROPE_SCALING_FIELDS.items()}


def _count(
    config: Mapping[str, Any], name: str, default: int | None = None, most: int = LARGEST_SIZE
) -> int:
    value = default if config.get(name) is None else config[name]
    if not isinstance(value, int) or not is_positive(value) or value > most:
        raise _unfit(name, value, f"a positive integer, at most {most}")
    return value


def _number(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value: Any = default if config.get(name) is None else config[name]
    if not is_positive(value):
        raise _unfit(name, value, "a positive number")
    return value


def _unfit(name: str, value: object, expected: str) -> UpcyclingError:
    return UpcyclingError(
        f"The dense checkpoint's config says {name}={shown(value)}; expected {expected}. "
        "Use a checkpoint with the config that it was saved with."
    )


MEGATRON = Family(
    model_type="megatron",
    architecture=architecture,
    parameters=PARAMETERS,
    tensors=TENSORS,
    tied=("output_layer.weight", "embedding.word_embeddings.weight"),
)

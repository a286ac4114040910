"""Read the architecture from Megatron's own configs, of dense models and upcycled ones."""

import math
from collections.abc import Mapping
from typing import Any

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.family import ACTIVATIONS, MULTIPLIERS, Architecture
from nemo_upcycle.families.rope import SCALING_FIELDS, scaling_type
from nemo_upcycle.families.values import LARGEST_SIZE, MOST_LISTED, is_positive, shown

MODEL_TYPE = "megatron"
"""Model type of a config with Megatron's field names."""

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

OF_NO_FAMILY: dict[str, Any] = {
    "qk_l2_norm": False,
    "attention_output_gate": False,
    "window_attn_skip_freq": None,
    "mrope_section": None,
    "linear_attention_freq": None,
    "experimental_attention_variant": None,
    "use_mup": False,
    # Fields of Megatron-LM's arguments.
    "quick_geglu": False,
    "hybrid_layer_pattern": None,
    "hybrid_override_pattern": None,
    "heterogeneous_layers_config_path": None,
    # Fields of Megatron-Bridge's model providers.
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": None,
    "interleaved_attn_pattern": None,
    "hybrid_attention_pattern": None,
    "rotary_base_per_layer": None,
    "swiglu_limits": None,
}
"""Fields that change what is computed, off in all families. Most have no weights, so that the
tensors would fit."""

MEGATRON_ROPE_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
"""What Megatron-Core's own RoPE scaling is, beside its factor; NeMo's names."""


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read the architecture of a dense model from a config with Megatron's field names.

    Raises:
        UpcyclingError: A number is missing, or the model is an MoE or none that can be upcycled.
    """
    experts = config.get("num_moe_experts")
    if experts is not None:
        raise UpcyclingError(
            f"The dense checkpoint's config says num_moe_experts={experts}: it is an MoE already. "
            "Give a dense checkpoint; to train this one on, resume from it."
        )
    return moe_architecture(config)


def moe_architecture(config: Mapping[str, Any]) -> Architecture:
    """Read the architecture of a model that is dense, or was before it was upcycled.

    Raises:
        UpcyclingError: A number is missing, or a field is one that no family has.
    """
    for name, usual in (LLAMA_FIELDS | OF_NO_FAMILY).items():
        value = config.get(name, usual)
        if name not in _OF_FAMILIES and value != usual and (value or usual):
            raise _unsupported(name, value, usual)
    heads = _count(config, "num_attention_heads")
    hidden_size = _count(config, "hidden_size")
    head_width = _count(config, "kv_channels", hidden_size // max(1, heads))
    scaling = scaling_in(config)
    arch = Architecture(
        num_layers=_count(config, "num_layers", most=MOST_LISTED),
        hidden_size=hidden_size,
        ffn_hidden_size=_count(config, "ffn_hidden_size"),
        num_attention_heads=heads,
        num_query_groups=_count(config, "num_query_groups", heads),
        kv_channels=head_width,
        vocab_size=_count(config, "vocab_size"),
        max_position_embeddings=_count(
            config, "max_position_embeddings", config.get("seq_length") or 4096
        ),
        layernorm_epsilon=_number(config, "layernorm_epsilon", 1e-5),
        rotary_base=float(_number(config, "rotary_base", 10000.0)),
        rope_scaling=scaling,
        share_embeddings_and_output_weights=bool(
            config.get("share_embeddings_and_output_weights", False)
        ),
        init_method_std=_number(config, "init_method_std", 0.02),
        activation=_activation(config),
        normalization=_normalization(config),
        add_qkv_bias=bool(config.get("add_qkv_bias")),
        qk_layernorm=bool(config.get("qk_layernorm")),
        rotary_percent=_number(config, "rotary_percent", 1.0),
        seq_len_interpolation_factor=_interpolation(config),
        sliding_window=_window(config),
        nope_layers=_nope_layers(config),
        attention_multiplier=_attention_multiplier(config, scaling, head_width),
        **{name: _number(config, name, 1.0) for name in MULTIPLIERS},
    )
    if not 0 < arch.num_query_groups <= heads or heads % arch.num_query_groups:
        raise UpcyclingError(
            f"The dense checkpoint's config says {heads} attention heads and "
            f"{arch.num_query_groups} query groups; expected the second to divide the first."
        )
    return arch


_OF_FAMILIES = (
    "normalization",
    "gated_linear_unit",
    "add_qkv_bias",
    "qk_layernorm",
    "layernorm_zero_centered_gamma",
    "rotary_percent",
    "seq_len_interpolation_factor",
    "window_size",
    "softmax_scale",
    "no_rope_freq",
)
"""Fields of `LLAMA_FIELDS` in which the families that can be upcycled differ."""

MEGATRON_NORMS = {
    kind + ending: (kind, ending == "1p")
    for kind in ("RMSNorm", "LayerNorm")
    for ending in ("", "1p")
}
"""Megatron's names of an architecture's norms, and whether 1 is added to the weight."""


def _activation(config: Mapping[str, Any]) -> str:
    gated = bool(config.get("gated_linear_unit", True))
    function = config.get("activation_func", "silu" if gated else "squared_relu")
    if function is None:
        raise UpcyclingError(
            "The checkpoint's run_config.yaml does not say which activation function the model "
            "has: Megatron's own GPTModelConfig does not save functions. Add a line to the file, "
            "below transformer, such as activation_func: silu."
        )
    function = str(getattr(function, "__name__", function))  # a config in memory has functions
    named = function.rpartition(".")[2]
    for name, kind in ACTIVATIONS.items():
        if (kind.is_gated, kind.function) == (gated, named):
            return name
    raise UpcyclingError(
        f"The dense checkpoint's config says activation_func={function!r} with "
        f"gated_linear_unit={gated}; only SwiGLU ('silu' with a gate), GeGLU ('gelu_tanh', this "
        "package's, with a gate) and squared ReLU ('squared_relu' without one) can be upcycled."
    )


def _normalization(config: Mapping[str, Any]) -> str:
    kind = str(config.get("normalization") or "RMSNorm")
    adds_one = bool(config.get("layernorm_zero_centered_gamma"))
    found = kind + ("1p" if adds_one else "")
    if found not in MEGATRON_NORMS:
        raise UpcyclingError(
            f"The dense checkpoint's config says normalization={kind!r}; only RMSNorm and "
            "LayerNorm can be upcycled."
        )
    return found


def _interpolation(config: Mapping[str, Any]) -> float | None:
    name = "seq_len_interpolation_factor"
    return None if config.get(name) is None else _number(config, name)


def _window(config: Mapping[str, Any]) -> int | None:
    """Return the tokens that a token attends to; Megatron counts those before it, -1 is all."""
    window = config.get("window_size")
    if window is None or window == -1:
        return None
    pair = list(window) if isinstance(window, list | tuple) else []
    if len(pair) != 2 or any(type(n) is not int for n in pair) or pair[0] < -1 or pair[1] > 0:
        raise _unfit("window_size", window, "None, or the tokens before a token and 0 after it")
    return None if pair[0] == -1 else pair[0] + 1


def _nope_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the layers without RoPE; Megatron has every n-th, or a 1 for each of them."""
    skips, layers = config.get("no_rope_freq"), config["num_layers"]
    if not skips:
        return ()
    if isinstance(skips, int) and layers % skips == 0:
        return tuple(range(skips - 1, layers, skips))
    if not isinstance(skips, list | tuple) or len(skips) != layers or {*skips} - {0, 1}:
        raise _unfit("no_rope_freq", skips, f"None, or 0 or 1 for each of {layers} layers")
    return tuple(layer for layer, skip in enumerate(skips) if skip)


def _unsupported(name: str, found: object, expected: object) -> UpcyclingError:
    return UpcyclingError(
        f"The dense checkpoint's config says {name}={found!r}; only {expected!r} can be upcycled."
    )


def scaling_in(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the RoPE scaling from a config's fields: the inverse of `rope.scaling_fields`.

    Raises:
        UpcyclingError: A number is missing.
    """
    kind = scaling_type(config)
    if kind is None:
        return None
    numbers: dict[str, Any] = {
        word: _number(config, name)
        for name, word in SCALING_FIELDS[kind].items()
        if word != "truncate"
    }
    if kind == "yarn":
        numbers["truncate"] = bool(config.get("yarn_correction_range_round_to_int", True))
    return {"rope_type": kind, **numbers}


def _attention_multiplier(
    config: Mapping[str, Any], scaling: Mapping[str, Any] | None, head_width: int
) -> float | None:
    """Return the factor of the scores without YaRN's, or None if it is the usual one."""
    usual = head_width**-0.5
    found = _number(config, "softmax_scale", usual)
    own = found / (scaling or {}).get("attention_factor", 1.0) ** 2
    return None if math.isclose(own, usual, rel_tol=1e-9) else own


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

"""Read the architecture from a Hugging Face `config.json`, as transformers does.

Keys that transformers does not read for a family are ignored, such as `attention_bias` of a
Mistral. So are keys that only matter in training, such as `attention_dropout`: recipes set these.
"""

from collections.abc import Mapping
from typing import Any

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.family import ACTIVATIONS, OF_GRANITE, Architecture
from nemo_upcycle.families.rope import (
    check_attention_factor,
    nope_layers,
    rope_scaling,
    rotary_percent,
)
from nemo_upcycle.families.values import MOST_LISTED, Values, unfit

_FULL, _WINDOWED = "full_attention", "sliding_attention"
_ONE_KEY_PER_QUERY = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "smollm3", "phi3"),
    *("granite", "granitemoe", "granitemoeshared"),
)
"""Families for which transformers reads `num_key_value_heads: null` as one per head."""

NORMS = {"nemotron": "LayerNorm1p", "gemma": "RMSNorm1p", "stablelm": "LayerNorm"}
"""Kinds of norms by family, see `Architecture`; RMSNorm where none is said."""

_DERIVED_HEAD_WIDTH = ("stablelm",)
"""Families whose attention does not read `head_dim`, though their RoPE does."""

ROUNDED_ROOT = ("gemma",)
"""Families whose embeddings are multiplied by the root of the hidden size, in their dtype."""

QKV_BIAS = "use_qkv_bias"
"""A StableLM's key for biases of queries, keys and values."""

_EPSILONS = ("rms_norm_eps", "norm_eps", "layer_norm_eps")
_UNFIT = ("attention_bias", "mlp_bias", "qk_layernorm", "use_parallel_residual")
"""Keys that must be false, if the family reads them."""


def read_architecture(config: Mapping[str, Any], family: str, **fields: Any) -> Architecture:
    """Read the architecture of a model.

    Args:
        config: The parsed `config.json`, in the format of transformers 4 or 5.
        family: The model type.
        fields: Fields that the family fixes.

    Returns:
        The architecture.

    Raises:
        UpcyclingError: A value has the wrong type, or transformers or Megatron cannot compute
            the model.
    """
    values = Values(config, family)
    for feature in _UNFIT:
        can_have = feature == "attention_bias" and "add_qkv_bias" in fields
        if feature in values.defaults and not can_have and values.flag(feature):
            raise unfit(feature, True, "false: only a model without it can be upcycled")
    if QKV_BIAS in values.defaults:
        fields["add_qkv_bias"] = values.flag(QKV_BIAS)
    head_width = _head_width(values, family)
    arch = Architecture(
        num_layers=_layers(values),
        hidden_size=values.count("hidden_size"),
        ffn_hidden_size=values.count("intermediate_size"),
        num_attention_heads=values.count("num_attention_heads"),
        num_query_groups=_query_groups(values, family),
        kv_channels=head_width,
        vocab_size=_vocabulary(values),
        max_position_embeddings=values.count("max_position_embeddings"),
        layernorm_epsilon=values.number(next(key for key in _EPSILONS if key in values.defaults)),
        rotary_base=values.number("rope_theta"),
        rotary_percent=rotary_percent(values, head_width, family),
        share_embeddings_and_output_weights=values.flag("tie_word_embeddings"),
        init_method_std=values.number("initializer_range"),
        activation=_activation(values, family),
        normalization=NORMS.get(family, "RMSNorm"),
        sliding_window=_window(values, family),
        nope_layers=nope_layers(values, _layers(values)),
        **_multipliers(values, head_width, family),
        **rope_scaling(values, family),
        **fields,
    )
    factor = (arch.rope_scaling or {}).get("attention_factor", 1.0)
    check_attention_factor(factor, arch.rotary_percent, arch.nope_layers)
    if arch.num_attention_heads % arch.num_query_groups:
        raise UpcyclingError(
            f"config.json says {arch.num_attention_heads} attention heads and "
            f"{arch.num_query_groups} key-value heads; expected the second to divide the first."
        )
    return arch


def _multipliers(values: Values, head_width: int, family: str) -> dict[str, Any]:
    """Return a Granite's factors, or a Gemma's; others do not read the keys in transformers."""
    if family in ROUNDED_ROOT:
        return {"rounded_embedding_multiplier": values.count("hidden_size") ** 0.5}
    found = {name: values.number(name) for name in OF_GRANITE if name in values.defaults}
    if "attention_multiplier" in values.defaults:
        factor = values.number("attention_multiplier")
        found |= {} if factor == head_width**-0.5 else {"attention_multiplier": factor}
    return found


def _layers(values: Values) -> int:
    return values.count("num_hidden_layers", most=MOST_LISTED)


def _head_width(values: Values, family: str) -> int:
    """Return the width per head from the config, or else the hidden size over the heads."""
    key = "head_dim"
    hidden, heads = values.count("hidden_size"), values.count("num_attention_heads")
    derived = hidden // heads
    if family in _DERIVED_HEAD_WIDTH and hidden % heads:
        raise unfit("hidden_size", hidden, f"a multiple of num_attention_heads={heads}")
    null_fits = values.defaults.get(key, 0) is None  # the classes that derive it
    if key not in values.said or (null_fits and values.is_null(key)):
        return derived
    width = values.count(key)
    if family in _DERIVED_HEAD_WIDTH and width != derived:
        raise unfit(key, width, f"{derived}, the hidden size over the heads, or no {key}")
    return width


def _query_groups(values: Values, family: str) -> int:
    key = "num_key_value_heads"
    one_each = values.is_null(key) and family in _ONE_KEY_PER_QUERY
    return values.count("num_attention_heads" if one_each else key)


def _vocabulary(values: Values) -> int:
    size, padding = values.count("vocab_size"), values.said.get("pad_token_id")
    if padding is not None and not (isinstance(padding, int) and -size <= padding < size):
        raise unfit("pad_token_id", padding, f"one of the vocabulary's {size} tokens, or null")
    return size


def _activation(values: Values, family: str) -> str:
    said, usual = values.said["hidden_act"], values.defaults["hidden_act"]
    for name, kind in ACTIVATIONS.items():
        if said in kind.words and usual in kind.words:
            return name
    why = "only that can be upcycled"
    if (family, said) == ("gemma", "gelu"):
        why = (
            "the function that Gemma was trained with, by which older versions of transformers "
            "replaced it. Newer ones compute exact GELU, as config.json says; correct config.json"
        )
    raise unfit("hidden_act", said, f"{usual!r}: {why}")


# --- Sliding windows -----------------------------------------------------------------------------


def _window(values: Values, family: str) -> int | None:
    """Return the size of the sliding window in tokens, or None without a window.

    Megatron's model has one window for all layers.
    """
    size, layers = _window_size(values, family), _layers(values)
    first = 0 if size is not None else layers
    if size is not None and "max_window_layers" in values.defaults:
        first = values.count("max_window_layers", least=0)
    kinds = [_WINDOWED if layer >= first else _FULL for layer in range(layers)]
    if size is not None and (nope := nope_layers(values, layers)):
        kinds = [_WINDOWED if layer in nope else _FULL for layer in range(layers)]
    said = _layer_types(values, layers)
    if said is not None and size is not None and "layer_types" in values.defaults:
        kinds = said
    elif said not in (None, kinds):
        raise UpcyclingError(
            f"config.json says layer_types={said}, and else a sliding window of {size}, of which "
            f"transformers makes no model or several; expected {kinds}, or no layer_types."
        )
    windowed = [layer for layer, kind in enumerate(kinds) if kind == _WINDOWED]
    if len(windowed) not in (0, layers):
        raise UpcyclingError(
            f"config.json asks for a sliding window in layers {windowed} of {layers}; only a "
            "window in all layers or in none can be upcycled."
        )
    return size if windowed else None


def _window_size(values: Values, family: str) -> int | None:
    key, switch = "sliding_window", "use_sliding_window"
    if key not in values.defaults or values.is_null(key):
        return None
    if switch in values.defaults and not values.flag(switch):
        return None
    if family == "qwen2_moe":
        raise UpcyclingError(
            f"config.json says {switch}=True of a Qwen2-MoE, in which transformers 4 and 5 have "
            "windows in different layers; only a model without windows can be read."
        )
    return values.count(key)


def _layer_types(values: Values, layers: int) -> list[str] | None:
    """Return the kind of attention per layer, if set.

    If a family's model does not read the key, transformers' key-value cache does.
    """
    kinds = values.said.get("layer_types")
    if kinds is None:
        return None
    known = (_FULL, _WINDOWED)
    if not isinstance(kinds, list) or len(kinds) != layers or not all(k in known for k in kinds):
        raise unfit("layer_types", kinds, f"{_FULL} or {_WINDOWED} for each of {layers} layers")
    return kinds

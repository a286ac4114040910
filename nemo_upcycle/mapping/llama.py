"""Llama 2, 3, 3.1, 3.2 (`LlamaForCausalLM`)."""

from collections.abc import Mapping
from typing import Any

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.mapping.family import (
    QKV,
    Architecture,
    Family,
    GatedMLP,
    Operation,
    Rename,
)

_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."

PARAMETERS: dict[str, Operation] = {
    "embedding.word_embeddings.weight": Rename("model.embed_tokens.weight"),
    "decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight": Rename(
        _LAYER + "input_layernorm.weight"
    ),
    "decoder.layers.{layer}.self_attention.linear_qkv.weight": QKV(
        _ATTENTION + "q_proj.weight", _ATTENTION + "k_proj.weight", _ATTENTION + "v_proj.weight"
    ),
    "decoder.layers.{layer}.self_attention.linear_proj.weight": Rename(
        _ATTENTION + "o_proj.weight"
    ),
    "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight": Rename(
        _LAYER + "post_attention_layernorm.weight"
    ),
    "decoder.layers.{layer}.mlp.linear_fc1.weight": GatedMLP(
        _MLP + "gate_proj.weight", _MLP + "up_proj.weight"
    ),
    "decoder.layers.{layer}.mlp.linear_fc2.weight": Rename(_MLP + "down_proj.weight"),
    "decoder.final_layernorm.weight": Rename("model.norm.weight"),
    "output_layer.weight": Rename("lm_head.weight"),
}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read the numbers of a Llama `config.json`.

    Raises:
        UpcyclingError: A number is missing, or the config asks for something that Megatron's
            Llama does not compute.
    """
    try:
        heads = config["num_attention_heads"]
        rope = config.get("rope_parameters") or config  # transformers 5 moved rope_theta there
        arch = Architecture(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            layernorm_epsilon=config.get("rms_norm_eps", 1e-6),
            rotary_base=rope.get("rope_theta", 10000.0),
            rope_scaling=_rope_scaling(config),
            share_embeddings_and_output_weights=config.get("tie_word_embeddings", False),
            init_method_std=config.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise UpcyclingError(
            f"config.json lacks {error}; expected the config of a Llama model."
        ) from None
    _check(config, arch)
    return arch


def _check(config: Mapping[str, Any], arch: Architecture) -> None:
    if arch.num_attention_heads % arch.num_query_groups:
        raise UpcyclingError(
            f"config.json says {arch.num_attention_heads} attention heads and "
            f"{arch.num_query_groups} key-value heads; expected the second to divide the first."
        )
    unsupported = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    for key, expected in unsupported.items():
        if config.get(key, expected) != expected:
            raise UpcyclingError(
                f"config.json says {key}={config[key]!r}; only {expected!r} can be upcycled."
            )


def _rope_scaling(config: Mapping[str, Any]) -> dict[str, float] | None:
    """Return Llama 3.1's RoPE scaling, None where there is none."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UpcyclingError(
            f"config.json asks for RoPE scaling {kind!r}; only 'llama3' (or none) can be upcycled."
        )
    keys = (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    )
    return {key: scaling[key] for key in keys}


def shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of every dense tensor.

    V vocabulary, D hidden size, F feed-forward size, N·H query and K·H key width.
    """
    d, f = arch.hidden_size, arch.ffn_hidden_size
    nh = arch.num_attention_heads * arch.kv_channels
    kh = arch.num_query_groups * arch.kv_channels
    result: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (arch.vocab_size, d),
        "model.norm.weight": (d,),
    }
    if not arch.share_embeddings_and_output_weights:
        result["lm_head.weight"] = (arch.vocab_size, d)
    layer_shapes: dict[str, tuple[int, ...]] = {
        _LAYER + "input_layernorm.weight": (d,),
        _LAYER + "post_attention_layernorm.weight": (d,),
        _ATTENTION + "q_proj.weight": (nh, d),
        _ATTENTION + "k_proj.weight": (kh, d),
        _ATTENTION + "v_proj.weight": (kh, d),
        _ATTENTION + "o_proj.weight": (d, nh),
        _MLP + "gate_proj.weight": (f, d),
        _MLP + "up_proj.weight": (f, d),
        _MLP + "down_proj.weight": (d, f),
    }
    for layer in range(arch.num_layers):
        for name, shape in layer_shapes.items():
            result[name.format(layer=layer)] = shape
    return result


LLAMA = Family(
    model_type="llama",
    architecture=architecture,
    parameters=PARAMETERS,
    shapes=shapes,
    ignored=("rotary_emb.inv_freq",),
    tied=("lm_head.weight", "model.embed_tokens.weight"),
)

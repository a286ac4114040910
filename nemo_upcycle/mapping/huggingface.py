"""Read the numbers of a model out of a Hugging Face `config.json`."""

from collections.abc import Mapping
from typing import Any

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.mapping.family import Architecture

_LLAMA3_ROPE = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def read_architecture(
    config: Mapping[str, Any], expected: Mapping[str, Any], **fields: Any
) -> Architecture:
    """Read the numbers that all families write alike.

    Args:
        config: The parsed `config.json`.
        expected: Keys that must have this value where they are there: what Megatron's model would
            compute otherwise.
        fields: What the family decides by itself, instead of or beside what is read.

    Returns:
        The numbers.

    Raises:
        UpcyclingError: A number is missing, or the config asks for something that Megatron's
            model does not compute.
    """
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise UpcyclingError(
                f"config.json says {key}={config[key]!r}; only {value!r} can be upcycled."
            )
    try:
        heads = config["num_attention_heads"]
        rope = config.get("rope_parameters") or config  # transformers 5 moved rope_theta there
        read = {
            "num_layers": config["num_hidden_layers"],
            "hidden_size": config["hidden_size"],
            "ffn_hidden_size": config["intermediate_size"],
            "num_attention_heads": heads,
            "num_query_groups": config.get("num_key_value_heads") or heads,
            "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
            "vocab_size": config["vocab_size"],
            "max_position_embeddings": config.get("max_position_embeddings", 2048),
            "layernorm_epsilon": config.get("rms_norm_eps", 1e-6),
            "rotary_base": rope.get("rope_theta", 10000.0),
            "share_embeddings_and_output_weights": config.get("tie_word_embeddings", False),
            "init_method_std": config.get("initializer_range", 0.02),
            **_rope(config),
        }
    except KeyError as error:
        raise UpcyclingError(
            f"config.json lacks {error}; expected the config of a {config.get('model_type')} model."
        ) from None
    arch = Architecture(**(read | fields))
    if arch.num_attention_heads % arch.num_query_groups:
        raise UpcyclingError(
            f"config.json says {arch.num_attention_heads} attention heads and "
            f"{arch.num_query_groups} key-value heads; expected the second to divide the first."
        )
    return arch


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return Llama 3.1's RoPE scaling, or the factor of a linear one (Code Llama, Llama 2 long)."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return {"rope_scaling": None}
    if kind == "linear":
        return {"rope_scaling": None, "seq_len_interpolation_factor": scaling["factor"]}
    if kind == "llama3":
        return {"rope_scaling": {key: scaling[key] for key in _LLAMA3_ROPE}}
    raise UpcyclingError(
        f"config.json asks for RoPE scaling {kind!r}; only 'llama3', 'linear' or none can be "
        "upcycled."
    )

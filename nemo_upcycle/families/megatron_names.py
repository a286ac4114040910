"""Families of dense checkpoints with Megatron's own names: NeMo 2, Megatron-LM, Megatron-Bridge.

Megatron's configs do not name a family. The fields do: a checkpoint is read if a family computes
what all fields say together.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.defaults import DEFAULTS
from nemo_upcycle.families.family import (
    ACTIVATIONS,
    Architecture,
    DownMLP,
    Family,
    GatedMLP,
    Operation,
    Rename,
    UpMLP,
)
from nemo_upcycle.families.huggingface import NORMS, QKV_BIAS, ROUNDED_ROOT
from nemo_upcycle.families.llama import MEGATRON_LAYER
from nemo_upcycle.families.llama import PARAMETERS as LLAMA_PARAMETERS
from nemo_upcycle.families.megatron import MODEL_TYPE, architecture
from nemo_upcycle.families.rope import UNSCALED_ROPE

_ATTENTION = MEGATRON_LAYER + "self_attention."
_MLP = MEGATRON_LAYER + "mlp."
_FC1, _QKV_BIAS = _MLP + "linear_fc1.weight", _ATTENTION + "linear_qkv.bias"
_EMBEDDINGS, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"

_AXES: dict[str, tuple[str, ...]] = {
    _EMBEDDINGS: ("vocab", "hidden"),
    _OUTPUT: ("vocab", "hidden"),
    _ATTENTION + "linear_qkv.weight": ("qkv", "hidden"),
    _QKV_BIAS: ("qkv",),
    _ATTENTION + "q_layernorm.weight": ("head",),
    _ATTENTION + "k_layernorm.weight": ("head",),
    _ATTENTION + "linear_proj.weight": ("hidden", "queries"),
    _FC1: ("fc1", "hidden"),
    _MLP + "linear_fc2.weight": ("hidden", "ffn"),
}
"""Axes of Megatron's parameters; all others are vectors over the hidden size."""


def dense_family(config: Mapping[str, Any], families: Collection[Family]) -> Family:
    """Return the family of a dense model whose tensors have Megatron's names.

    Args:
        config: Values by Megatron's field names.
        families: Families of Hugging Face checkpoints.

    Raises:
        UpcyclingError: No family computes what the config says; the message names the fields.
    """
    arch = architecture(config)
    for family in families:
        if not _beyond(family, arch):
            return _with_megatrons_names(family)
    unusual = {
        "activation_func": (ACTIVATIONS[arch.activation].function, "silu"),
        "gated_linear_unit": (arch.gated_linear_unit, True),
        "normalization": (arch.normalization, "RMSNorm"),
        "add_qkv_bias": (arch.add_qkv_bias, False),
        "qk_layernorm": (arch.qk_layernorm, False),
        "rotary_percent": (arch.rotary_percent, 1.0),
        "window_size": (config.get("window_size"), None),
        "seq_len_interpolation_factor": (arch.seq_len_interpolation_factor, None),
        "scale_factor": (config.get("scale_factor"), None),
        "no_rope_freq": (config.get("no_rope_freq"), None),
        "attention_multiplier": (arch.attention_multiplier, None),
        **{name: (value, 1.0) for name, value in arch.multipliers.items()},
    }
    said = ", ".join(
        f"{name}={value!r}" for name, (value, usual) in unusual.items() if value != usual
    )
    raise UpcyclingError(
        f"The dense checkpoint's config says {said}: no family that can be upcycled has these "
        f"together. The families are {', '.join(family.model_type for family in families)}."
    )


def _beyond(family: Family, arch: Architecture) -> bool:
    """Return whether a family computes something else than a model with these numbers."""
    kind, defaults = family.model_type, DEFAULTS[family.model_type]
    scaled = arch.rope_scaling is not None or arch.seq_len_interpolation_factor is not None
    optional = {_QKV_BIAS} if QKV_BIAS in defaults else set()
    needed = LLAMA_PARAMETERS.keys() | _own_parameters(arch)
    return (
        family.parameters.keys() - optional != needed - optional
        or NORMS.get(kind, "RMSNorm") != arch.normalization
        or defaults["hidden_act"] not in ACTIVATIONS[arch.activation].words
        or (arch.rounded_embedding_multiplier != 1) != (kind in ROUNDED_ROOT)
        or (arch.sliding_window is not None and "sliding_window" not in defaults)
        or (arch.rotary_percent != 1 and "partial_rotary_factor" not in defaults)
        or (_is_multiplied(arch) and "residual_multiplier" not in defaults)
        or (bool(arch.nope_layers) and "no_rope_layers" not in defaults)
        or (scaled and kind in UNSCALED_ROPE)
    )


def _is_multiplied(arch: Architecture) -> bool:
    """Return whether a model has a Granite's multipliers."""
    return replace(arch, rounded_embedding_multiplier=1.0).is_multiplied


def _own_parameters(arch: Architecture) -> set[str]:
    """Return the parameters of a model that a Llama does not have."""
    names: set[str] = set()
    if arch.add_qkv_bias:
        names |= {_QKV_BIAS}
    if arch.qk_layernorm:
        names |= {_ATTENTION + "q_layernorm.weight", _ATTENTION + "k_layernorm.weight"}
    if arch.norm_has_bias:
        names |= {
            _ATTENTION + "linear_qkv.layer_norm_bias",
            _MLP + "linear_fc1.layer_norm_bias",
            "decoder.final_layernorm.bias",
        }
    return names


def _with_megatrons_names(family: Family) -> Family:
    """Return a family whose tensors are Megatron's parameters."""
    return Family(
        model_type=f"{MODEL_TYPE} {family.model_type}",
        architecture=architecture,
        parameters={name: _same(name, found) for name, found in family.parameters.items()},
        tensors={name: _AXES.get(name, ("hidden",)) for name in family.parameters},
        tied=(_OUTPUT, _EMBEDDINGS),
    )


def _same(name: str, operation: Operation) -> Operation:
    """Return the operation that takes a parameter from the tensor of the same name."""
    if isinstance(operation, GatedMLP):
        return GatedMLP(name, name)
    if isinstance(operation, UpMLP):
        return UpMLP(name)
    return DownMLP(name) if isinstance(operation, DownMLP) else Rename(name)

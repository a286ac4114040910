"""RoPE: what a Hugging Face config says of rotations and their scaling, and Megatron's fields.

A scaling is a mapping with Hugging Face's names, all numbers filled in: `rope_type`, and what the
type needs (`SCALING_FIELDS`).
"""

import math
from collections.abc import Mapping
from typing import Any

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.values import Values, positive, unfit

SCALING_FIELDS: dict[str, dict[str, str]] = {
    "llama3": {
        "scale_factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "old_context_len": "original_max_position_embeddings",
    },
    "yarn": {
        "scale_factor": "factor",
        "old_context_len": "original_max_position_embeddings",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
        "yarn_correction_range_round_to_int": "truncate",
        "yarn_attention_factor": "attention_factor",
    },
}
"""By type of scaling: the fields of this package's configs, and Hugging Face's names. The fields
have NeMo's names for Llama 3.1's scaling, and Megatron's for YaRN. `yarn_rotary_scaling_factor` is
not among them: if a config has the field, Megatron's attention applies a factor of its own."""

ROPE_SCALING_FIELDS = tuple(
    dict.fromkeys(name for each in SCALING_FIELDS.values() for name in each)
)
"""All fields for RoPE scaling."""

UNSCALED_ROPE = ("nemotron", "phi3")
"""Families whose RoPE cannot be scaled. Of a Nemotron only transformers 5 computes a scaling; of a
Phi-3 both versions compute `longrope` alone, by whatever name."""

_OF_LENGTH = {
    "dynamic": "remove rope_scaling: up to max_position_embeddings tokens, the model computes the "
    "same without it",
    "longrope": "there is no way around it",
}
"""Types whose frequencies depend on a sequence's length, and what a user can do."""


def rotary_percent(values: Values, head_width: int, family: str) -> float:
    """Return the fraction of a head that is rotated; below 1 only if the family reads the key."""
    key = "partial_rotary_factor"
    part = values.number(key) if key in values.said else 1.0
    if key not in values.defaults and part != 1:
        raise UpcyclingError(
            f"config.json says {key}={part}, with which transformers 4 computes nothing and "
            "transformers 5 what it computes without; remove it."
        )
    if part > 1:
        raise unfit(key, part, "a number above 0 and at most 1")
    rotated = int(head_width * part)
    is_odd = family == "stablelm" and rotated % 2  # with which transformers makes no model
    if is_odd or not 0 < rotated + rotated % 2 <= head_width:
        raise UpcyclingError(
            f"config.json asks for RoPE over {rotated} of the {head_width} numbers of a head; "
            "expected pairs of them, at least one."
        )
    return part


def rope_scaling(values: Values, family: str) -> dict[str, Any]:
    """Return the fields of an architecture for RoPE scaling.

    Args:
        values: The config.
        family: The model type.

    Raises:
        UpcyclingError: A number is missing, or Megatron cannot compute the type.
    """
    scaling = values.said.get("rope_scaling")
    if scaling is None:
        return {"rope_scaling": None}
    kind = "longrope" if family == "phi3" else scaling["rope_type"]
    if kind == "linear":  # as in Code Llama
        return {"rope_scaling": None, "seq_len_interpolation_factor": _number(scaling, "factor")}
    if kind == "llama3":
        numbers = {name: _number(scaling, name) for name in SCALING_FIELDS[kind].values()}
        return {"rope_scaling": {"rope_type": kind, **numbers}}
    if kind == "yarn":
        if family == "mixtral" and values.is_null("head_dim"):
            raise UpcyclingError(
                "config.json asks for RoPE scaling 'yarn' with head_dim=null, of which "
                "transformers makes no Mixtral; say head_dim, the hidden size over the heads."
            )
        return {"rope_scaling": {"rope_type": kind, **_yarn(scaling)}}
    way_out = _OF_LENGTH.get(kind)
    why = (
        f" Its frequencies depend on a sequence's length, which Megatron cannot compute; {way_out}."
        if way_out
        else ""
    )
    said = scaling["rope_type"]
    known = "only none" if family == "phi3" else "only 'llama3', 'yarn', 'linear' or none"
    raise UpcyclingError(
        f"config.json asks for RoPE scaling {said!r}; {known} can be upcycled.{why}"
    )


def nope_layers(values: Values, layers: int) -> tuple[int, ...]:
    """Return the layers without RoPE, as in SmolLM3; none if the family does not read the keys."""
    key = "no_rope_layers"
    if key not in values.defaults:
        return ()
    said = values.said[key]  # where 1 means with RoPE
    if said is None:
        step = values.count("no_rope_layer_interval")
        return tuple(range(step - 1, layers, step))
    if (
        not isinstance(said, list)
        or len(said) != layers
        or any(each not in (0, 1) for each in said)
    ):
        raise unfit(key, said, f"0 or 1 for each of {layers} layers")
    return tuple(layer for layer, rotates in enumerate(said) if not rotates)


def check_attention_factor(factor: float, percent: float, nope: tuple[int, ...]) -> None:
    """Check that a factor of rotated queries and keys is one of whole scores in all layers.

    Raises:
        UpcyclingError: Some of what the scores are made of is not rotated.
    """
    if factor != 1 and (percent != 1 or nope):
        where = f"layers {list(nope)} without RoPE" if nope else f"rotary_percent={percent}"
        raise UpcyclingError(
            f"config.json asks for RoPE scaling 'yarn' with an attention factor of {factor} and "
            f"{where}; Megatron can only scale all scores of all layers. Only an attention_factor "
            "of 1 can be upcycled with them."
        )


def _yarn(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Return YaRN's numbers (arXiv 2309.00071) as transformers fills them in."""
    factor = _number(scaling, "factor")
    truncate = scaling.get("truncate", True)
    if not isinstance(truncate, bool | None):
        raise unfit("truncate of RoPE scaling", truncate, "true or false")
    return {
        "factor": factor,
        "original_max_position_embeddings": _number(scaling, "original_max_position_embeddings"),
        "beta_fast": _number(scaling, "beta_fast", 32.0),
        "beta_slow": _number(scaling, "beta_slow", 1.0),
        "truncate": bool(truncate),
        "attention_factor": _attention_factor(scaling, factor),
    }


def _attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    """Return the number that multiplies queries and keys, section 3.4 of the paper."""
    if scaling.get("attention_factor") is not None:
        return _number(scaling, "attention_factor")

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if not (scaling.get("mscale") and scaling.get("mscale_all_dim")):
        return temperature(1.0)
    above, below = (_number(scaling, name) for name in ("mscale", "mscale_all_dim"))
    return temperature(above) / temperature(below)


def _number(scaling: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = scaling.get(name)
    return positive(f"{name} of RoPE scaling", default if value is None else value)


# --- Megatron's fields ---------------------------------------------------------------------------


def scaling_fields(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the fields of this package's configs that say a scaling; none for no scaling."""
    if scaling is None:
        return {}
    return {name: scaling[word] for name, word in SCALING_FIELDS[scaling["rope_type"]].items()}


def scaling_type(config: Mapping[str, Any]) -> str | None:
    """Return the type of the scaling that a config's fields say; None for no scaling."""
    if config.get("scale_factor") is None:
        return None
    return "llama3" if config.get("yarn_beta_fast") is None else "yarn"

"""Translate a Hugging Face `config.json` of any version into the keys of transformers 4.

Version 5 of transformers writes RoPE settings to `rope_parameters`; version 4 uses `rope_theta`,
`rope_scaling` and `partial_rotary_factor`. Version 5 reads both. Version 4 reads only its own keys,
and would compute another model from a config of version 5. Some files have keys of both.
"""

from collections.abc import Mapping
from typing import Any

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.defaults import DEFAULTS

_ROPE_WORDS = ("rope_theta", "partial_rotary_factor")
"""Keys at the top level in transformers 4, and in `rope_parameters` in transformers 5."""


def in_words_of_transformers_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the keys of transformers 4.

    Args:
        config: The parsed `config.json`, with keys of transformers 4, 5 or both.

    Returns:
        The config with RoPE in `rope_theta`, `rope_scaling` and `partial_rotary_factor`, and with
        the number of experts under the family's key. Missing keys keep their defaults.

    Raises:
        UpcyclingError: Keys contradict each other, transformers 4 and 5 read them differently, or
            transformers 4 cannot express the setting.
    """
    words = _experts(dict(config))
    five, four = (_rope(config, place) for place in ("rope_parameters", "rope_scaling"))
    words.pop("rope_parameters", None)
    if five and four:
        _check_both(five, four, config)
    for word in _ROPE_WORDS:
        words |= _at_the_top(word, five, four, config)
    words |= _scaling(five or four, config)
    return words


def _rope(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return a key's RoPE settings, with the kind under `rope_type`; empty if unset."""
    said = config.get(place)
    if said is None:
        return {}
    if not isinstance(said, Mapping):
        raise UpcyclingError(
            f"config.json says {place}={said!r}; expected an object such as "
            '{"rope_type": "linear", "factor": 2.0}, or null.'
        )
    for key, value in said.items():
        if isinstance(value, Mapping):
            raise UpcyclingError(
                f"config.json says {place}={{{key!r}: {value!r}}}: RoPE that differs by kind of "
                "layer; only one for all layers can be upcycled."
            )
    rope = dict(said)
    if {"type", "rope_type"} <= rope.keys():  # of which one version or the other ignores a null
        unsaid = [key for key in ("type", "rope_type") if rope[key] is None]
        rope = {key: value for key, value in rope.items() if key not in unsaid[:1]}
    if "type" in rope:  # its name before transformers 4.43
        kind = rope.pop("type")
        if rope.setdefault("rope_type", kind) != kind:
            raise UpcyclingError(
                f"config.json says rope_type={rope['rope_type']!r} and type={kind!r} in {place}; "
                "expected one of them, or the same."
            )
    if rope.get("factor") is not None and "rope_type" not in rope:
        raise UpcyclingError(
            f"config.json says factor={rope['factor']!r} in {place} without a rope_type, which "
            "transformers 4 refuses and transformers 5 ignores; name it, or remove the factor."
        )
    if rope and not isinstance(rope.setdefault("rope_type", "default"), str):
        raise UpcyclingError(
            f"config.json says rope_type={rope['rope_type']!r} in {place}; expected a name."
        )
    return rope


def _check_both(
    five: Mapping[str, Any], four: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Check that both keys agree: if both are present, transformers 5 reads `rope_scaling`."""
    scalings = [
        {key: value for key, value in said.items() if key not in _ROPE_WORDS}
        for said in (five, four)
    ]
    unread = [w for w in _ROPE_WORDS if w in five and w not in four and config.get(w) is None]
    if scalings[0] != scalings[1] or unread:
        raise UpcyclingError(
            f"config.json says rope_parameters={dict(five)} and rope_scaling={dict(four)}; "
            "expected one of them, or the same in both"
            + "".join(f", and {word} beside them" for word in unread)
            + "."
        )


def _at_the_top(
    word: str, five: Mapping[str, Any], four: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a top-level key of transformers 4 with its value, if set.

    transformers 5 reads the key from `rope_scaling`, `rope_parameters` and the top level, in this
    order; transformers 4 reads the top level.
    """
    places = {"rope_scaling": four, "rope_parameters": five, "the top level": config}
    said = {place: words[word] for place, words in places.items() if word in words}
    if five and said.get("the top level", 0) is None:
        del said["the top level"]  # unset for transformers 5
    values = list(said.values())
    if any(value != values[0] for value in values[1:]):  # NaN is not even equal to itself
        listed = " and ".join(f"{value!r} in {place}" for place, value in said.items())
        raise UpcyclingError(
            f"config.json says {word}={listed}, of which transformers 4 and 5 read different "
            "ones; expected one."
        )
    if list(said) == ["rope_scaling"]:
        raise UpcyclingError(
            f"config.json says {word}={values[0]!r} in rope_scaling, where transformers 5 reads "
            f"it and transformers 4 does not; say {word} beside rope_scaling."
        )
    return {word: values[0]} if said else {}


def _scaling(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rope_scaling` for transformers 4, if there is any scaling."""
    kind = rope.get("rope_type", "default")
    family = str(config.get("model_type"))
    if kind == "default":
        return {"rope_scaling": None} if rope or "rope_scaling" in config else {}
    if family == "nemotron":
        raise UpcyclingError(
            f"config.json asks for RoPE scaling {kind!r} in a Nemotron, which transformers 5 "
            "computes and transformers 4 does not; only none can be upcycled."
        )
    scaling = {key: value for key, value in rope.items() if key not in _ROPE_WORDS}
    if kind in ("llama3", "yarn", "longrope"):
        scaling |= _original_length(scaling, config, DEFAULTS.get(family, {}))
    return {"rope_scaling": scaling}


def _original_length(
    scaling: Mapping[str, Any], config: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the length before scaling: transformers 5 also reads it beside `rope_scaling`."""
    word, longest = "original_max_position_embeddings", "max_position_embeddings"
    outside = config.get(word)
    if word in scaling:
        if outside not in (None, scaling[word]):
            raise UpcyclingError(
                f"config.json says {word}={scaling[word]!r} for RoPE and {outside!r} at the top "
                "level, of which transformers 4 and 5 read different ones; expected one."
            )
        return {}
    context = config.get(longest, defaults.get(longest))
    if scaling.get("rope_type") == "yarn" and outside not in (None, context):
        raise UpcyclingError(
            f"config.json says {word}={outside!r} beside RoPE's scaling by YaRN, where "
            f"transformers 5 reads it and transformers 4 does not; say {word} in rope_scaling."
        )
    length = context if outside is None else outside
    return {} if length is None else {word: length}


def _experts(config: dict[str, Any]) -> dict[str, Any]:
    """Store the number of experts under the family's key in transformers 4."""
    names = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}
    kind = str(config.get("model_type"))
    if kind == "glm4_moe":
        _check_one_count(config, "n_routed_experts", "num_local_experts")
    name = names.get(kind)
    if name is None:
        return config
    said = {key: config[key] for key in names.values() if key in config}
    if len(set(map(repr, said.values()))) > 1:
        listed = " and ".join(f"{key}={value!r}" for key, value in said.items())
        raise UpcyclingError(f"config.json says {listed}; expected one of them, or the same.")
    if said:
        config = {key: value for key, value in config.items() if key not in said}
        config[name] = next(iter(said.values()))
    return config


def _check_one_count(config: Mapping[str, Any], name: str, other: str) -> None:
    """Check that a key that transformers 5 alone reads says what the other key says."""
    if other in config and config[other] != config.get(name, config[other]):
        raise UpcyclingError(
            f"config.json says {name}={config[name]!r} and {other}={config[other]!r}, of which "
            f"transformers 4 reads the first alone; remove {other}."
        )
    if other in config and name not in config:
        raise UpcyclingError(
            f"config.json says {other}={config[other]!r}, which transformers 4 does not read; say "
            f"{name}."
        )

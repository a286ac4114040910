"""Typed and checked values of a Hugging Face `config.json`."""

import sys
from collections.abc import Mapping
from typing import Any

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.config_words import in_words_of_transformers_4
from nemo_upcycle.families.defaults import DEFAULTS

LARGEST_SIZE = 2**31 - 1
"""Limit of any count: larger values overflow Megatron's indices."""

MOST_LISTED = 10_000
"""Limit of layers or experts, over which the code iterates."""

_SHOWN = 200
"""Maximum characters of a value in a message."""

_CUTS_THE_CACHE = "by which transformers' cache of keys and values is cut, and its model is not"
_READ_APART = {
    "per_layer_config": "of which transformers 5 makes layers that differ and transformers 4 none",
    "pruned_heads": "with which transformers 4 opens no model, and which transformers 5 ignores",
    "attention_chunk_size": _CUTS_THE_CACHE,
    "num_kv_shared_layers": _CUTS_THE_CACHE,
    "kv_sharing_modes": _CUTS_THE_CACHE,
    "use_bidirectional_attention": "with which tokens of a Gemma see those after them in "
    "transformers 5 and not in 4",
}
"""Non-empty keys that one version or part of transformers reads and another does not."""

_READ_APART_IF_FALSE = {
    "is_causal": "with which tokens see those after them in transformers 5 and not in 4",
}
"""The same for keys that matter if false or null; true is the default."""


class Values:
    """A config with the keys of transformers 4 and the family's defaults.

    Args:
        config: The parsed `config.json`.
        family: The model type, whatever the config says.

    Attributes:
        defaults: transformers' defaults of all keys that it reads.
        said: The values of the config, or defaults, by key.

    Raises:
        UpcyclingError: Keys contradict each other, or only one version reads a key.
    """

    def __init__(self, config: Mapping[str, Any], family: str) -> None:
        self.defaults: Mapping[str, Any] = DEFAULTS[family]
        words = in_words_of_transformers_4({**config, "model_type": family})
        self.said: Mapping[str, Any] = {**self.defaults, **words}
        self._check_read_alike(config)

    def _check_read_alike(self, config: Mapping[str, Any]) -> None:
        reasons = {key: why for key, why in _READ_APART.items() if config.get(key)}
        reasons |= {
            key: why for key, why in _READ_APART_IF_FALSE.items() if not config.get(key, True)
        }
        if "sliding_window" not in self.defaults and config.get("sliding_window"):
            reasons["sliding_window"] = _CUTS_THE_CACHE
        for key, why in reasons.items():
            raise UpcyclingError(f"config.json says {key}={shown(config[key])}, {why}; remove it.")

    def is_null(self, key: str) -> bool:
        """Return whether a key is null or missing."""
        return self.said.get(key) is None

    def count(self, key: str, least: int = 1, most: int = LARGEST_SIZE) -> int:
        """Return an integer.

        Raises:
            UpcyclingError: The value is no integer, less than `least`, or more than `most`.
        """
        value = self.said.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise unfit(key, value, f"an integer of at least {least}")
        if value > most:
            raise unfit(key, value, f"an integer of at most {most}")
        return value

    def number(self, key: str) -> float:
        """Return a number above 0; see `positive`."""
        return positive(key, self.said.get(key))

    def flag(self, key: str) -> bool:
        """Return true or false; null is false, as in transformers 4.

        Raises:
            UpcyclingError: The value is something else.
        """
        value = self.said.get(key)
        if not isinstance(value, bool | None):
            raise unfit(key, value, "true or false")
        return bool(value)


def positive(key: str, value: Any) -> float:
    """Return a value that must be a number above 0.

    Raises:
        UpcyclingError: The value is something else, or not finite.
    """
    if not is_positive(value):
        raise unfit(key, value, "a number above 0")
    return value


def is_positive(value: Any) -> bool:
    """Return whether a value is a finite number above 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value <= sys.float_info.max


def unfit(key: str, value: Any, expected: str) -> UpcyclingError:
    """Return the error for an invalid value."""
    said = "null" if value is None else shown(value)
    return UpcyclingError(f"config.json says {key}={said}; expected {expected}.")


def shown(value: object) -> str:
    """Return a value as text for a message, truncated if long."""
    said = repr(value)
    return said if len(said) <= _SHOWN else f"{said[:_SHOWN]}…"

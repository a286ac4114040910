"""What a Hugging Face `config.json` says, each value of the kind that it has to be."""

import math
from collections.abc import Mapping
from typing import Any

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.config_words import in_words_of_transformers_4
from nemo_upcycle.families.defaults import DEFAULTS

_OF_ONE_VERSION = {
    "per_layer_config": "of which transformers 5 makes layers that differ and transformers 4 none",
    "pruned_heads": "with which transformers 4 opens no model, and which transformers 5 ignores",
}
"""Keys that only one version of transformers reads, where they are not empty."""


class Values:
    """A config in the words of transformers 4, with the defaults of its family.

    Args:
        config: The parsed `config.json`.
        family: Its model type, whatever the config says.

    Attributes:
        defaults: What transformers takes where the config is silent, of all keys that it reads.
        said: What the config says or is silent on, by key.

    Raises:
        UpcyclingError: Its words contradict each other, or one is only one version's.
    """

    def __init__(self, config: Mapping[str, Any], family: str) -> None:
        self.defaults: Mapping[str, Any] = DEFAULTS[family]
        words = in_words_of_transformers_4({**config, "model_type": family})
        self.said: Mapping[str, Any] = {**self.defaults, **words}
        for key, why in _OF_ONE_VERSION.items():
            if config.get(key):
                raise UpcyclingError(f"config.json says {key}={config[key]!r}, {why}; remove it.")

    def is_null(self, key: str) -> bool:
        """Say whether a key is null or not there."""
        return self.said.get(key) is None

    def count(self, key: str, least: int = 1) -> int:
        """Return an integer.

        Raises:
            UpcyclingError: It is something else, or less than `least`.
        """
        value = self.said.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise unfit(key, value, f"an integer of at least {least}")
        return value

    def number(self, key: str) -> float:
        """Return a number above 0; see `positive`."""
        return positive(key, self.said.get(key))

    def flag(self, key: str) -> bool:
        """Return true or false; null is false, as for transformers 4.

        Raises:
            UpcyclingError: It is something else.
        """
        value = self.said.get(key)
        if not isinstance(value, bool | None):
            raise unfit(key, value, "true or false")
        return bool(value)


def positive(key: str, value: Any) -> float:
    """Return a value that has to be a number above 0.

    Raises:
        UpcyclingError: It is something else, or not finite.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise unfit(key, value, "a number above 0")
    return value


def unfit(key: str, value: Any, expected: str) -> UpcyclingError:
    """Return the error of a value that is not what it has to be."""
    said = "null" if value is None else repr(value)
    return UpcyclingError(f"config.json says {key}={said}; expected {expected}.")

"""Mistral (`MistralForCausalLM`): a Llama that may see a window of the last tokens only."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_upcycle.mapping.family import Architecture
from nemo_upcycle.mapping.huggingface import read_architecture
from nemo_upcycle.mapping.llama import EXPECTED, LLAMA


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read the numbers of a Mistral `config.json`; see `read_architecture`."""
    window = config.get("sliding_window", 4096)  # transformers' own default
    return read_architecture(config, EXPECTED, sliding_window=window)


MISTRAL = replace(LLAMA, model_type="mistral", architecture=architecture)

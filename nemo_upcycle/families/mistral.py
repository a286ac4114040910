"""Mistral (`MistralForCausalLM`): a Llama with an optional sliding window."""

from dataclasses import replace
from functools import partial

from nemo_upcycle.families.huggingface import read_architecture
from nemo_upcycle.families.llama import LLAMA

MISTRAL = replace(
    LLAMA, model_type="mistral", architecture=partial(read_architecture, family="mistral")
)

"""Mistral (`MistralForCausalLM`): a Llama that may see a window of the last tokens only."""

from dataclasses import replace
from functools import partial

from nemo_upcycle.families.huggingface import read_architecture
from nemo_upcycle.families.llama import LLAMA

MISTRAL = replace(
    LLAMA, model_type="mistral", architecture=partial(read_architecture, family="mistral")
)

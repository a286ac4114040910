"""SmolLM3 (`SmolLM3ForCausalLM`): a Llama in which some layers have no RoPE (arXiv 2501.18795)."""

from dataclasses import replace
from functools import partial

from nemo_upcycle.families.huggingface import read_architecture
from nemo_upcycle.families.llama import LLAMA

SMOLLM3 = replace(
    LLAMA, model_type="smollm3", architecture=partial(read_architecture, family="smollm3")
)

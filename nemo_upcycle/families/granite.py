"""Granite 3 (`GraniteForCausalLM`): a Llama with multipliers (arXiv 2408.13359).

Embeddings, scores, logits and what a layer adds to the residual are multiplied by constants. The
weights stay as they are: multiplied weights would be rounded once more.
"""

from dataclasses import replace
from functools import partial

from nemo_upcycle.families.huggingface import read_architecture
from nemo_upcycle.families.llama import LLAMA

GRANITE = replace(
    LLAMA, model_type="granite", architecture=partial(read_architecture, family="granite")
)

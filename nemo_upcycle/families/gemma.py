"""Gemma 1 and CodeGemma (`GemmaForCausalLM`): a Llama with GeGLU and scaled embeddings.

Norms add 1 to their weight. Embeddings are multiplied by the root of the hidden size, which is
rounded to their dtype first.
"""

from dataclasses import replace
from functools import partial

from nemo_upcycle.families.huggingface import read_architecture
from nemo_upcycle.families.llama import LLAMA

GEMMA = replace(LLAMA, model_type="gemma", architecture=partial(read_architecture, family="gemma"))

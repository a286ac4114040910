"""StableLM 3B, StableLM 2 1.6B and Stable Code (`StableLmForCausalLM`): a Llama with LayerNorm.

RoPE rotates only a part of each head. Some models have biases on queries, keys and values. StableLM
2 12B, which has norms of each head's queries and keys and a parallel residual, is refused.
"""

from dataclasses import replace
from functools import partial

from nemo_upcycle.families.huggingface import read_architecture
from nemo_upcycle.families.nemotron import NORM_BIAS_SHAPES, NORM_BIASES
from nemo_upcycle.families.qwen2 import QWEN2

STABLELM = replace(
    QWEN2,
    model_type="stablelm",
    architecture=partial(read_architecture, family="stablelm"),
    parameters={**QWEN2.parameters, **NORM_BIASES},
    tensors={**QWEN2.tensors, **NORM_BIAS_SHAPES},
)

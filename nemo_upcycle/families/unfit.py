"""Models that are refused, and what they compute that no family here declares.

Most of it the GPT models of Megatron-Core 0.15 and 0.19 cannot compute either.
"""

_AFTER = "norms after attention and feed-forward"
_SOME_WINDOWS = "a sliding window in some layers"

DENSE: dict[str, str] = {
    "apertus": "the activation xIELU",
    "cohere": "attention and feed-forward in parallel, and RoPE of neighboring numbers",
    "cohere2": f"attention and feed-forward in parallel, and {_SOME_WINDOWS}",
    "exaone4": f"{_AFTER} in place of before, and {_SOME_WINDOWS}",
    "gemma2": f"soft-capped scores and logits, {_AFTER}, and {_SOME_WINDOWS}",
    "gemma3": f"{_AFTER}, and in some layers a sliding window and another RoPE base",
    "gemma3_text": f"{_AFTER}, and in some layers a sliding window and another RoPE base",
    "glm": "RoPE of neighboring numbers",
    "glm4": f"{_AFTER}, and RoPE of neighboring numbers",
    "internlm2": "code that comes with the checkpoint and is not in transformers",
    "internlm3": "code that comes with the checkpoint and is not in transformers",
    "llama4": "queries scaled by their position, and attention in chunks in some layers",
    "llama4_text": "queries scaled by their position, and attention in chunks in some layers",
    "ministral": _SOME_WINDOWS,
    "ministral3": "queries scaled by their position",
    "olmo": "norms without weights",
    "olmo2": f"{_AFTER} in place of before, and norms over all heads' queries and keys together",
    "olmo3": f"{_AFTER} in place of before, norms over all heads' queries and keys together, and "
    f"{_SOME_WINDOWS}",
    "phi": "attention and feed-forward in parallel, and biases of all linear layers",
    "qwen3_5": "linear attention in some layers, and a gate of the attention's output",
    "qwen3_5_text": "linear attention in some layers, and a gate of the attention's output",
    "starcoder2": "GELU without a gate, and biases of all linear layers",
}
"""By model type, the features of dense models; a model type that is not here is unknown."""

MOE: dict[str, str] = {
    "deepseek_v2": "multi-head latent attention",
    "deepseek_v3": "multi-head latent attention, and a router by sigmoid with groups and biases",
    "dots1": "a router by sigmoid with groups and biases",
    "ernie4_5_moe": "a router with biases, and RoPE of neighboring numbers",
    "flex_olmo": f"{_AFTER} in place of before",
    "gpt_oss": "biases of experts and router, clamped activations, and attention sinks",
    "llama4_text": "a router by sigmoid that scales the experts' inputs",
    "olmoe": "norms over all heads' queries and keys together",
    "phimoe": "a router by sparse mixer, and biases of attention and norms",
    "qwen3_next": "linear attention in some layers, and a gate of the attention's output",
}
"""By model type, the features of Mixture-of-Experts models that an upcycled model does not have."""


def feature_of(model_type: object, features: dict[str, str]) -> str:
    """Return an end for a message that names what a model type has; empty if unknown."""
    found = features.get(str(model_type))
    return f" It has {found}, which no family here computes." if found else ""

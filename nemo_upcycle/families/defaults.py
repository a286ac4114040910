"""Default values in transformers for keys that a `config.json` does not set, by family.

These are the defaults of the config classes, equal in transformers 4 and 5, for all keys that
change what is computed.
"""

from typing import Any

_ALL: dict[str, Any] = {
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
}
_LLAMA: dict[str, Any] = {
    **_ALL,
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
}
_MISTRAL: dict[str, Any] = {
    **_ALL,
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_QWEN2: dict[str, Any] = {
    **_ALL,
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_QWEN2_MOE: dict[str, Any] = {
    **_QWEN2,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "qkv_bias": True,
}
_GRANITE: dict[str, Any] = {
    **{key: value for key, value in _LLAMA.items() if key != "head_dim"},
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
}
_GRANITE_MOE: dict[str, Any] = {
    **{key: value for key, value in _GRANITE.items() if key != "mlp_bias"},
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _QWEN2,
    "qwen3": {**_QWEN2, "head_dim": 128, "attention_bias": False},
    "nemotron": {
        **{key: value for key, value in _LLAMA.items() if key != "rms_norm_eps"},
        "vocab_size": 256000,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_attention_heads": 48,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "initializer_range": 0.0134,
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
    },
    "smollm3": {
        **{key: value for key, value in _LLAMA.items() if key != "head_dim"},
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2000000.0,
        "pad_token_id": 128004,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
    "phi3": {
        **_ALL,
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 32000,
        "partial_rotary_factor": 1.0,
        "sliding_window": None,
    },
    "granite": _GRANITE,
    "granitemoe": _GRANITE_MOE,
    "granitemoeshared": {**_GRANITE_MOE, "shared_intermediate_size": 0},
    "mixtral": {
        **_MISTRAL,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
    "qwen2_moe": _QWEN2_MOE,
    "qwen3_moe": {
        **{
            key: value
            for key, value in _QWEN2_MOE.items()
            if key
            not in (
                "qkv_bias",
                "shared_expert_intermediate_size",
                "max_window_layers",
                "layer_types",
            )
        },
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "attention_bias": False,
    },
    "glm4_moe": {
        **_ALL,
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "attention_bias": False,
        "use_qk_norm": False,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
    },
}
"""Defaults by model type and key. A family's class does not read keys that are missing here, with
one exception: the models of Qwen2, Qwen2-MoE, SmolLM3, Phi-3, Granite and GLM-4-MoE read `head_dim`
if set."""

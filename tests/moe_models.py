"""Tiny MoEs in Hugging Face's format, made by `transformers` itself."""

from pathlib import Path
from typing import Any

from tests.tiny import CONFIG

MOES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {}),
    "mixtral, tied": ("Mixtral", {"tie_word_embeddings": True}),
    "qwen2_moe": ("Qwen2Moe", {"shared_expert_intermediate_size": 48}),
    "qwen2_moe, some layers": ("Qwen2Moe", {"mlp_only_layers": [1], "norm_topk_prob": True}),
    "qwen3_moe": ("Qwen3Moe", {"norm_topk_prob": True, "head_dim": 16}),
    "qwen3_moe, softmax first": ("Qwen3Moe", {"norm_topk_prob": False, "num_experts_per_tok": 1}),
    "granitemoe": ("GraniteMoe", {"residual_multiplier": 0.22, "logits_scaling": 6.0}),
    "granitemoeshared": ("GraniteMoeShared", {"shared_intermediate_size": 48}),
    "glm4_moe": ("Glm4Moe", {"first_k_dense_replace": 1, "n_shared_experts": 2}),
    "glm4_moe, no shared expert": ("Glm4Moe", {"n_shared_experts": 0, "use_qk_norm": True}),
    "glm4_moe, one expert": ("Glm4Moe", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
}
"""By name: the beginning of the classes' names, and what is asked of the config."""

_COMMON = {
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "shared_expert_intermediate_size": 1,
}
_COUNTS = {"Glm4Moe": "n_routed_experts", "Qwen2Moe": "num_experts", "Qwen3Moe": "num_experts"}


def write_moe(directory: Path, kind: str, **config: Any) -> Path:
    """Write a random MoE of 4 experts whose norms, biases and routers do something."""
    import torch
    import transformers

    name, own = MOES[kind]
    torch.manual_seed(0)
    values = {**CONFIG, **_COMMON, _COUNTS.get(name, "num_local_experts"): 4, **own, **config}
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**values)
    )
    with torch.no_grad():
        for parameter_name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "correction_bias" in parameter_name or parameter_name.endswith("bias"):
                value.uniform_(-0.5, 0.5)
            elif "norm" in parameter_name:
                value.uniform_(0.5, 1.5)
            elif parameter_name.endswith(("gate.weight", "router.layer.weight")):
                value.normal_()
    model.save_pretrained(directory, safe_serialization=True)
    return directory

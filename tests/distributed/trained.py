"""Trained models of every kind that can be exported, and their import as a user does it."""

from pathlib import Path
from typing import Any

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from tests.distributed import scenarios
from tests.distributed.pool import RankPool, nemo_recipe
from tests.distributed.step0 import IDS
from tests.tiny import LLAMA31_ROPE, YARN, write_dense

WEIGHTS = "model.safetensors"


@nemo_recipe
def import_ckpt(source: Path, output: Path) -> None:
    """Import as a user does."""
    from nemo.collections import llm

    from nemo_upcycle.nemo.model import UpcycledGPTModel

    llm.import_ckpt(UpcycledGPTModel(), f"hf://{source}", output)


G4 = {"num_moe_experts": 16, "granularity": 4, "moe_router_topk": 8}
SIGMOID = {"moe_router_score_function": "sigmoid"}
BIAS = {**SIGMOID, "moe_router_enable_expert_bias": True}
PARTLY = {"moe_layer_freq": (0, 1, 1, 0)}
KINDS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("mixtral", "llama", {}, {}),
    "granular": ("mixtral", "llama", {}, G4),
    "Llama 3.1 RoPE": ("mixtral", "llama", {"rope_scaling": LLAMA31_ROPE}, {}),
    "linear RoPE": ("mixtral", "llama, linear RoPE", {}, {}),
    "YaRN": ("mixtral", "llama, YaRN", {}, {}),
    "window": ("mixtral", "mistral, window", {}, {}),
    "fused, window": ("mixtral", "phi3", {"partial_rotary_factor": 1.0}, {}),
    "tied": ("mixtral", "llama", {"tie_word_embeddings": True}, {}),
    "head size": ("mixtral", "llama", {"head_dim": 16}, {}),
    "softmax first": ("qwen2_moe", "llama", {}, {"moe_router_pre_softmax": True}),
    "partly dense": ("qwen2_moe", "llama", {}, PARTLY),
    "shared expert": ("qwen2_moe", "llama", {}, {"moe_shared_expert": True}),
    "biases": ("qwen2_moe", "qwen2", {}, {}),
    "everything": (
        "qwen2_moe",
        "qwen2, tied",
        {"rope_scaling": YARN},
        {**G4, **PARTLY, "moe_shared_expert": True, "moe_router_pre_softmax": True},
    ),
    "part shared": ("qwen2_moe", "llama", {}, {**G4, "moe_shared_expert_intermediate_size": 32}),
    "sigmoid": ("glm4_moe", "llama", {"rope_scaling": LLAMA31_ROPE}, SIGMOID),
    "sigmoid, expert bias": ("glm4_moe", "qwen3", {"tie_word_embeddings": True}, BIAS),
    "sigmoid, one expert": ("glm4_moe", "llama", {}, {**SIGMOID, "moe_router_topk": 1}),
    "sigmoid, everything": (
        "glm4_moe",
        "qwen2, tied",
        {},
        {**G4, **BIAS, "moe_layer_freq": (0, 1, 1, 1), "moe_shared_expert": True},
    ),
    "multipliers": ("granitemoe", "granite", {"tie_word_embeddings": True}, {}),
    "multipliers, shared expert": (
        "granitemoeshared",
        "granite",
        {"rope_scaling": YARN},
        {**G4, "moe_shared_expert": True},
    ),
    "q and k norm": ("qwen3_moe", "qwen3", {}, {}),
    "q and k norm, softmax first, partly dense": (
        "qwen3_moe",
        "qwen3",
        {"rope_scaling": {**YARN, "truncate": False}},
        {**G4, **PARTLY, "moe_router_pre_softmax": True},
    ),
}


NOT_EXPORTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "squared ReLU": ("nemotron", {}, "squared ReLU"),
    "norms that add 1": ("gemma", {}, "norms that add 1 to their weight"),
    "LayerNorm": ("stablelm", {}, "LayerNorm with biases"),
    "some layers without RoPE": ("smollm3", {}, r"layers without RoPE \(\[3\]\), which"),
    "a part rotated": ("phi3", {}, r"rotary_percent=0\.75"),
    "q and k norm, shared expert": (
        "qwen3",
        {"moe_shared_expert": True},
        "with a shared expert",
    ),
    "window, softmax first": (
        "mistral, window",
        {"moe_router_pre_softmax": True},
        "a sliding window",
    ),
    "multipliers, softmax first": (
        "granite",
        {"moe_router_pre_softmax": True},
        "multipliers together with softmax before top-k",
    ),
    "multipliers, sigmoid": ("granite", SIGMOID, "sigmoid scores together with multipliers"),
    "multipliers, part shared": (
        "granite",
        {"moe_shared_expert_intermediate_size": 32},
        "multipliers together with a shared part of the layer",
    ),
    "window, sigmoid": ("mistral, window", SIGMOID, "scores together with a sliding window"),
    "normalized logits": ("llama", {"router_logit_normalization": 1.0}, "normalized router logits"),
    "sigmoid, a later dense layer": (
        "llama",
        {**SIGMOID, "moe_layer_freq": (1, 0, 1, 1)},
        "dense layers after MoE layers",
    ),
    "sigmoid, half an expert shared": (
        "llama",
        {**SIGMOID, "moe_shared_expert_intermediate_size": 32},
        "no multiple of the 64",
    ),
}
"""What no architecture of transformers computes: a family, the upcycling, and what is said."""


def trained(
    ranks: RankPool, directory: Path, kind: str, folding: ParallelFolding, world_size: int
) -> tuple[Path, list[scenarios.Logits | None]]:
    _, family, config, upcycling = KINDS[kind]
    dense = write_dense(directory / "dense", family, **config)
    saved = directory / "saved"
    outputs = ranks.run(
        scenarios.trained_and_saved,
        world_size,
        dense=dense,
        folding=folding,
        upcycling=UpcyclingConfig(**upcycling),
        directory=saved,
        ids=IDS,
    )
    return saved, outputs

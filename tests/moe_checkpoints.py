"""Tiny MoEs as Megatron stores them and as transformers names them, made in one process."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.megatron_checkpoints import FFN, HIDDEN, VOCAB, save_nemo

HEADS, GROUPS, HEAD = 4, 2, 2
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Kind:
    """An MoE of two layers.

    Attributes:
        model_type: What transformers calls the architecture that computes it.
        moe: Of each layer whether it has experts.
        experts: Experts in an MoE layer.
        width: Neurons of an expert.
        shared: Whether there is a shared expert.
        biases: Whether queries, keys and values have biases.
        norms: Whether queries and keys have norms.
        tied: Whether the output layer is the embeddings.
        fields: What Megatron's config says beside that.
    """

    model_type: str
    moe: tuple[bool, ...] = (True, True)
    experts: int = 4
    width: int = FFN
    shared: bool = False
    biases: bool = False
    norms: bool = False
    tied: bool = False
    fields: tuple[tuple[str, Any], ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        """The fields of Megatron's config that say it."""
        return {
            "num_moe_experts": self.experts,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": self.width,
            "moe_layer_freq": 1 if all(self.moe) else list(map(int, self.moe)),
            "moe_shared_expert_intermediate_size": FFN if self.shared else None,
            "add_qkv_bias": self.biases,
            "qk_layernorm": self.norms,
            "share_embeddings_and_output_weights": self.tied,
            **dict(self.fields),
        }


KINDS = {
    "plain": Kind("mixtral"),
    "granular": Kind("mixtral", experts=8, width=FFN // 2),
    "tied": Kind("mixtral", tied=True),
    "softmax first": Kind("qwen2_moe", fields=(("moe_router_pre_softmax", True),)),
    "biases": Kind("qwen2_moe", biases=True),
    "partly dense, shared expert": Kind("qwen2_moe", moe=(False, True), shared=True),
    "norms": Kind("qwen3_moe", norms=True),
}


def moe_weights(kind: Kind) -> Weights:
    """Return random weights by Megatron's names, layers and experts one by one."""
    qkv = (HEADS + 2 * GROUPS) * HEAD
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (VOCAB, HIDDEN),
        "decoder.final_layernorm.weight": (HIDDEN,),
    }
    if not kind.tied:
        shapes["output_layer.weight"] = (VOCAB, HIDDEN)
    for layer, moe in enumerate(kind.moe):
        attention = f"decoder.layers.{layer}.self_attention."
        shapes |= {
            attention + "linear_qkv.layer_norm_weight": (HIDDEN,),
            attention + "linear_qkv.weight": (qkv, HIDDEN),
            attention + "linear_proj.weight": (HIDDEN, HEADS * HEAD),
        }
        if kind.biases:
            shapes[attention + "linear_qkv.bias"] = (qkv,)
        if kind.norms:
            shapes |= {f"{attention}{part}_layernorm.weight": (HEAD,) for part in "qk"}
        shapes |= _moe_layer(kind, layer) if moe else _dense_layer(layer)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _dense_layer(layer: int) -> dict[str, tuple[int, ...]]:
    mlp = f"decoder.layers.{layer}.mlp."
    return {mlp + "linear_fc1.layer_norm_weight": (HIDDEN,), **_feed_forward(mlp, FFN)}


def _moe_layer(kind: Kind, layer: int) -> dict[str, tuple[int, ...]]:
    prefix = f"decoder.layers.{layer}."
    mlp = prefix + "mlp."
    found: dict[str, tuple[int, ...]] = {
        prefix + "pre_mlp_layernorm.weight": (HIDDEN,),
        mlp + "router.weight": (kind.experts, HIDDEN),
    }
    for expert in range(kind.experts):
        found |= _feed_forward(f"{mlp}experts.{expert}.", kind.width)
    return found | (_feed_forward(mlp + "shared_experts.", FFN) if kind.shared else {})


def _feed_forward(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {prefix + "linear_fc1.weight": (2 * width, HIDDEN),
            prefix + "linear_fc2.weight": (HIDDEN, width)}  # fmt: skip


def save_moe(
    directory: Path, kind: Kind, weights: Weights, stacked: bool = True, **config: Any
) -> Path:
    """Write a NeMo 2 checkpoint; experts, and layers if all are alike, stacked as Megatron does."""
    stored = weights
    if stacked:
        stored = _stack(weights, r"(\.mlp\.experts\.)\d+\.", r"\1experts.")
        if all(kind.moe):
            stored = _stack(stored, r"^(decoder\.layers\.)\d+\.", r"\1")
    return save_nemo(directory, stored, **{**kind.config, **config})


def _stack(weights: Weights, pattern: str, name: str) -> Weights:
    found: dict[str, list[torch.Tensor]] = {}
    for key, values in weights.items():
        found.setdefault(re.sub(pattern, name, key), []).append(values)
    return {
        key: torch.stack(parts) if re.search(name.replace(r"\1", ""), key) and key not in weights
        else parts[0]
        for key, parts in found.items()
    }  # fmt: skip


# --- transformers' names, written out -----------------------------------------------------------


def huggingface_weights(kind: Kind, weights: Weights) -> Weights:
    """Return the tensors that transformers has for the same model."""
    found = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
    }
    if not kind.tied:
        found["lm_head.weight"] = weights["output_layer.weight"]
    for layer, moe in enumerate(kind.moe):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        found |= _attention(kind, weights, ours + "self_attention.", theirs)
        norm = "pre_mlp_layernorm.weight" if moe else "mlp.linear_fc1.layer_norm_weight"
        found[theirs + "post_attention_layernorm.weight"] = weights[ours + norm]
        if moe:
            found |= _experts(kind, weights, ours + "mlp.", theirs)
        else:
            found |= _parts(weights, ours + "mlp.", theirs + "mlp.")
    return found


def _attention(kind: Kind, weights: Weights, ours: str, theirs: str) -> Weights:
    found = {
        theirs + "input_layernorm.weight": weights[ours + "linear_qkv.layer_norm_weight"],
        theirs + "self_attn.o_proj.weight": weights[ours + "linear_proj.weight"],
    }
    for part in ("weight", "bias") if kind.biases else ("weight",):
        qkv = weights[f"{ours}linear_qkv.{part}"]
        groups = qkv.view(GROUPS, HEADS // GROUPS + 2, HEAD, *qkv.shape[1:])
        cut = {"q": groups[:, :-2], "k": groups[:, -2], "v": groups[:, -1]}
        for name, values in cut.items():
            flat = values.reshape(-1, *qkv.shape[1:])
            found[f"{theirs}self_attn.{name}_proj.{part}"] = flat
    if kind.norms:
        for part in "qk":
            norm = weights[f"{ours}{part}_layernorm.weight"]
            found[f"{theirs}self_attn.{part}_norm.weight"] = norm
    return found


def _parts(
    weights: Weights,
    ours: str,
    theirs: str,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Weights:
    gate, up = weights[ours + "linear_fc1.weight"].chunk(2)
    parts = (gate, up, weights[ours + "linear_fc2.weight"])
    return {f"{theirs}{name}.weight": part for name, part in zip(names, parts, strict=True)}


def _experts(kind: Kind, weights: Weights, ours: str, theirs: str) -> Weights:
    mixtral = kind.model_type == "mixtral"
    mlp = theirs + ("block_sparse_moe." if mixtral else "mlp.")
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    found = {mlp + "gate.weight": weights[ours + "router.weight"]}
    for expert in range(kind.experts):
        found |= _parts(weights, f"{ours}experts.{expert}.", f"{mlp}experts.{expert}.", names)
    if kind.model_type == "qwen2_moe":
        found |= _shared_expert(kind, weights, ours, mlp)
    return found


def _shared_expert(kind: Kind, weights: Weights, ours: str, mlp: str) -> Weights:
    """Return a shared expert whose gate, 0, lets one half through; so down is twice Megatron's."""
    gate = {mlp + "shared_expert_gate.weight": torch.zeros(1, HIDDEN)}
    if kind.shared:
        found = _parts(weights, ours + "shared_experts.", mlp + "shared_expert.")
        return gate | found | {
            name: 2 * values for name, values in found.items() if "down_proj" in name
        }  # fmt: skip
    none = {
        ours + "shared_experts.linear_fc1.weight": torch.zeros(2, HIDDEN),
        ours + "shared_experts.linear_fc2.weight": torch.zeros(HIDDEN, 1),
    }
    return gate | _parts(none, ours + "shared_experts.", mlp + "shared_expert.")

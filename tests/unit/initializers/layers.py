"""Copies of dense layers in memory, initialized without a model."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nemo_upcycle.checkpoint.branches import open_branches
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.engine.experts import initialize_experts
from nemo_upcycle.engine.owned_shards import OwnedShard
from nemo_upcycle.plans.rank import Shard
from tests.tiny import write_llama

HIDDEN, FFN, EXPERTS, LAYERS = 64, 400, 4, 2
PARTS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
Weights = dict[str, torch.Tensor]


def write_layers(directory: Path, seed: int = 0) -> Path:
    """Write a dense model with `LAYERS` layers of `FFN` neurons."""
    return write_llama(directory, intermediate_size=FFN, num_hidden_layers=LAYERS, seed=seed)


def neurons_of(tensors: Weights, layer: int) -> Weights:
    """Return the dense layer's parts, [neurons, hidden]."""
    found = {p: tensors[f"model.layers.{layer}.mlp.{n}.weight"] for p, n in PARTS.items()}
    return found | {"down": found["down"].T}


def initialized(
    dense: Path | str, initializer: str, parts: int = 1, **config: Any
) -> dict[tuple[int, int], Weights]:
    """Return the experts' parts by layer and expert, after copies of the layer were initialized.

    Args:
        dense: The dense checkpoint.
        initializer: The initializer.
        parts: Ranks that each expert is cut over.
        config: Other fields of `UpcyclingConfig`.
    """
    upcycling = UpcyclingConfig(num_moe_experts=EXPERTS, initializer=initializer, **config)
    checkpoint = open_branches(str(dense))
    width = FFN // upcycling.granularity
    tensors = load_file(checkpoint.directory / "model.safetensors")
    result: dict[tuple[int, int], Weights] = {}
    for part in range(parts):
        rows = slice(part * width // parts, (part + 1) * width // parts)
        owned = []
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                start = upcycling.neurons(expert, FFN)[0]
                name = f"decoder.layers.{layer}.mlp.experts.{expert}."
                for place, (kind, values) in enumerate(neurons_of(tensors, layer).items()):
                    data = values[start : start + width][rows].clone()
                    if kind == "down":
                        shard = Shard(
                            name + "linear_fc2.weight",
                            (HIDDEN, width),
                            (0, rows.start),
                            (HIDDEN, len(data)),
                        )
                        owned.append(OwnedShard(shard, data.T.contiguous()))
                    else:
                        offset = (place * width + rows.start, 0)
                        shard = Shard(
                            name + "linear_fc1.weight", (2 * width, HIDDEN), offset, data.shape
                        )
                        owned.append(OwnedShard(shard, data))
        initialize_experts(owned, checkpoint, upcycling)
        for (layer, expert), found in by_expert(owned).items():
            whole = result.setdefault((layer, expert), {})
            for kind, values in found.items():
                whole[kind] = torch.cat([whole[kind], values]) if kind in whole else values
    return result


def by_expert(owned: list[OwnedShard]) -> dict[tuple[int, int], Weights]:
    found: dict[tuple[int, int], Weights] = {}
    kinds = iter(list(PARTS) * (len(owned) // 3))
    for own in owned:
        layer, expert = (int(word) for word in own.shard.name.split(".") if word.isdigit())
        kind = next(kinds)
        values = own.data.T if kind == "down" else own.data
        found.setdefault((layer, expert), {})[kind] = values
    return found

"""What router initializers do at the first step, on a trained dense model.

The model becomes E8T2 for each pair of initializers, as a Hugging Face MoE in fp32. Over held-out
text, averaged over the layers:

- entropy and confidence: of the softmax over all experts, and its largest value, per token
- load: coefficient of variation of the assignments to experts
- gradients: norm of all routers' gradients of the language-model loss, and of the auxiliary loss
  (coefficient 1) alone

Usage: nemo-upcycle calibrate DENSE --text TEXT --text TEXT --second-moment full --out STATISTICS
       python -m benchmarks.routers DENSE STATISTICS TEXT TEXT
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from nemo_upcycle.calibration.text import read_sources
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.data.encoder import load_encoder
from nemo_upcycle.engine.upcycled_directory import upcycle_directory

ROUTERS = {
    "random": "random",
    "centroids": "centroids(stats={file!r})",
    "centroids, not centered": "centroids(stats={file!r}, center=False)",
    "centroids, the paper's": "centroids(stats={file!r}, scale=1, center=False)",
    "ridge": "ridge(stats={file!r})",
    "ridge, the paper's": "ridge(stats={file!r}, scale=10)",
}
EXPERTS = ("copy", "drop(ratio=0.5)", "noise(std=0.02)")
LENGTH, SEQUENCES = 128, 16
SEEDS = (0, 1, 2)
"""Means over seeds are given; with copies, they change random rows alone."""


def measure(directory: Path, ids: torch.Tensor) -> dict[str, float]:
    """Return the figures of an MoE, for sequences that the calibration has not seen."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    outputs = model(ids, labels=ids, output_router_logits=True)
    logits = torch.stack(outputs.router_logits).double()  # [layers, tokens, experts]
    scores = logits.softmax(-1)
    chosen = torch.zeros_like(scores).scatter(2, logits.topk(2).indices, 1).mean(1)
    gates = [layer.block_sparse_moe.gate.weight for layer in model.model.layers]
    auxiliary = load_balancing_loss_func(outputs.router_logits, 8, 2)
    language = outputs.loss - model.router_aux_loss_coef * outputs.aux_loss
    return {
        "loss": float(language),
        "entropy": float(-(scores * logits.log_softmax(-1)).sum(-1).mean()),
        "confidence": float(scores.max(-1).values.mean()),
        "load": float((chosen.std(1, correction=0) / chosen.mean(1)).mean()),
        "of the loss": _norm(torch.autograd.grad(language, gates, retain_graph=True)),
        "of the auxiliary loss": _norm(torch.autograd.grad(auxiliary, gates)),
    }


def _norm(gradients: Any) -> float:
    return float(sum(gradient.double().square().sum() for gradient in gradients)) ** 0.5


def held_out(dense: Path, texts: list[str]) -> torch.Tensor:
    """Return sequences from beyond what is calibrated on."""
    sources = read_sources(texts, 10**6, load_encoder(dense), LENGTH)
    rows = [
        source.sequences[-2 - number]
        for source in sources
        for number in range(SEQUENCES // len(sources))
    ]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dense", type=Path)
    parser.add_argument("statistics", type=Path)
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--experts", nargs="*", default=EXPERTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ids = held_out(arguments.dense, arguments.texts)
    with tempfile.TemporaryDirectory() as temporary:
        print("| experts | router | loss | entropy | confidence | load | gradient of the loss | of "
              "the auxiliary loss |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
        for experts in arguments.experts:
            for name, text in ROUTERS.items():
                found = []
                for seed in SEEDS:
                    upcycling = UpcyclingConfig(
                        initializer=experts,
                        router_initializer=text.format(file=str(arguments.statistics)),
                        seed=seed,
                    )
                    out = Path(temporary) / f"{len(list(Path(temporary).iterdir()))}"
                    upcycle_directory(str(arguments.dense), out, upcycling, "F32")
                    found.append(measure(out, ids))
                means = [np.mean([each[key] for each in found]) for key in found[0]]
                print(f"| `{experts}` | {name} | " + " | ".join(f"{m:.4g}" for m in means) + " |")


if __name__ == "__main__":
    main()

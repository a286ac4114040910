"""Dense models with a tokenizer and text, to calibrate, and files of statistics."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from nemo_upcycle.calibration.calibrate import Calibration, calibrate
from nemo_upcycle.checkpoint.branches import open_branches
from nemo_upcycle.checkpoint.fingerprint import weights_fingerprint
from nemo_upcycle.initializers.statistics import FORMAT, MANIFEST
from tests.corpora import many, write
from tests.tiny import write_dense

VOCABULARY = 280
LENGTH = 24
"""Tokens per sequence."""


RANK = 8
"""Rank of clusters' weights in `write_statistics`."""


def write_calibratable(
    directory: Path, tokenizer: Path, family: str = "llama", seed: int = 0, **config: Any
) -> Path:
    """Write a tiny dense model that has a tokenizer."""
    values = {"vocab_size": VOCABULARY, "num_hidden_layers": 3} | config
    write_dense(directory, family, seed=seed, **values)
    for file in tokenizer.iterdir():
        shutil.copy(file, directory)
    return directory


def write_texts(directory: Path, count: int = 2) -> tuple[str, ...]:
    """Write sources of different text."""
    directory.mkdir(parents=True, exist_ok=True)
    return tuple(
        str(write(directory / f"text{number}.jsonl", many(40, seed=number)))
        for number in range(count)
    )


def calibrated(
    dense: Path | str, texts: tuple[str, ...], out: Path, processes: int = 1, **options: Any
) -> Path:
    """Calibrate on a few tokens; return the file."""
    values = {"tokens": 500, "sequence_length": LENGTH, "clusters": 4} | options
    calibrate(Calibration(str(dense), texts, out, **values), processes)
    return out


def write_statistics(
    file: Path, dense: Path | str, seed: int = 0, sources: int = 2, **manifest: Any
) -> Path:
    """Write a file of random statistics that fits a dense checkpoint."""
    checkpoint = open_branches(str(dense))
    arch = checkpoint.architecture
    hidden, ffn = arch.hidden_size, arch.ffn_hidden_size
    of_source = {"input.mean": hidden, "neurons.rate": ffn, "neurons.magnitude": ffn}
    values = {
        "format": FORMAT,
        "fingerprint": weights_fingerprint(checkpoint),
        "branches": len(checkpoint.branches),
        "num_layers": arch.num_layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "texts": [{"name": str(n), "tokens": 100 + n} for n in range(sources)],
        "prompts": [f"digest {expert}" for expert in range(8)],
        "clusters": 8,
        "cluster_rank": RANK,
        "second_moment": "full",
    } | manifest
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(arch.num_layers):
        inputs = random.standard_normal((300, hidden)) + random.standard_normal(hidden)
        centroids = random.standard_normal((values["clusters"], hidden)) + 1
        of_layer = {
            "input.mean": inputs.mean(0),
            "input.second_moment": inputs.T @ inputs / len(inputs),
            "neurons.rate": random.random(ffn),
            "neurons.magnitude": random.random(ffn),
            "clusters.centroids": centroids / np.linalg.norm(centroids, axis=1, keepdims=True),
            "clusters.basis": random.standard_normal(
                (values["clusters"], 2, values["cluster_rank"], hidden)
            ),
            "prompts.positive": random.standard_normal((len(values["prompts"]), hidden)),
            "prompts.negative": random.standard_normal((len(values["prompts"]), hidden)),
            **{
                f"sources.{source}.{name}": random.standard_normal(size)
                for source in range(sources)
                for name, size in of_source.items()
            },
        }
        tensors |= {f"layers.{layer}.{k}": v.astype(np.float32) for k, v in of_layer.items()}
    save_file(tensors, file, {MANIFEST: json.dumps(values)})
    return file

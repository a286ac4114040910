"""Directories of runs for `nemo-upcycle report`, with the files that training leaves."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.engine.load_record import LOADS, LoadRecord, Loads
from nemo_upcycle.engine.provenance import Origin, mapping_of
from tests.events import write_events

STEPS, EVERY, LAYERS, EXPERTS = 100, 10, 4, 8
FOLDING = ParallelFolding.of(tp=2, ep=4)
SETTINGS: dict[str, Any] = {
    "data.seq_length": 256,
    "data.seed": 1234,
    "data.split": "970,20,10",
    "data.tokenizer": "2048 tokens, end 1, 41f8a63c31863784",
    "data.paths": [[0.7, "data/documentation", "d6ee"], [0.3, "data/sources", "cdc8"]],
    "model.config.num_layers": LAYERS,
    "model.config.gated_linear_unit": True,
    "optim.config.optimizer": "adam",
    "optim.config.lr": 3e-3,
    "trainer.max_steps": STEPS,
}


def write_record(run: Path, origin: Origin) -> None:
    """Write a complete checkpoint that holds an origin, without weights."""
    weights = run / "checkpoints" / f"{run.name}--step={STEPS - 1}-last" / "weights"
    weights.mkdir(parents=True)
    (weights / "metadata.json").write_text("{}")
    torch.save({"callbacks": {"UpcyclingCallback": vars(origin)}}, weights / "common.pt")


def write_run(
    run: Path,
    dense_checkpoint: str = "models/dense",
    *,
    experts: int | None = EXPERTS,
    layers: int = LAYERS,
    world_size: int = 8,
    record: Mapping[str, Any] | None = None,
    scalars: Mapping[str, Mapping[int, float]] | None = None,
) -> Path:
    """Write the directory of a finished run.

    Args:
        run: The directory to make.
        dense_checkpoint: What the run says that it was upcycled from.
        experts: Experts per layer; None for a dense run.
        layers: Layers, the first of them dense.
        world_size: Ranks.
        record: Fields of `Origin` that are other.
        scalars: Logged numbers that are other.
    """
    folding = FOLDING if experts else ParallelFolding()
    upcycling = UpcyclingConfig(num_moe_experts=experts)
    origin = Origin.of(
        dense_checkpoint, "2771b1d9" * 8, upcycling, {"max_position_embeddings": 256}
    )
    fields = {
        "settings": SETTINGS,
        "step0": str(upcycling.exactness(gated=True, dense_checkpoints=1)),
        "mapping": mapping_of(folding, world_size, 8),
    }
    write_record(run, Origin(**{**vars(origin), **fields, **(record or {})}))
    write_events(run / "logs", {**_scalars(experts, layers), **(scalars or {})})
    if experts:
        loads = LoadRecord(run / LOADS)
        loads.begin(0)
        for step in range(1, STEPS, EVERY):
            loads.add(load_at(step, layers, experts))
    return run


def load_at(step: int, layers: int = LAYERS, experts: int = EXPERTS) -> Loads:
    """Return loads that differ in every cell, and from step to step."""
    found: list[tuple[float, ...] | None] = [None]
    for layer in range(1, layers):
        raw = [
            math.exp(math.sin(3.0 * expert + layer) * (0.2 + 1.5 * step / STEPS * layer / layers))
            for expert in range(experts)
        ]
        found.append(tuple(share / sum(raw) for share in raw))
    return Loads(step, tuple(found))


def write_scores(directory: Path, source: str, dense: bool = True) -> Path:
    """Write lm-eval's results of a checkpoint, and of the dense model."""
    directory.mkdir(parents=True)
    for name, score in (("results", 0.265), ("dense", 0.255))[: 1 + dense]:
        metrics = {"acc,none": score, "acc_stderr,none": 0.031, "perplexity,none": 12.5}
        results = {
            "results": {"next_line": {"alias": "next_line", **metrics}},
            "n-shot": {"next_line": 0},
            "n-samples": {"next_line": {"original": 500, "effective": 200}},
            "config": {"model_source": source},
        }
        (directory / f"{name}.json").write_text(json.dumps(results))
    return directory


def _scalars(experts: int | None, layers: int) -> dict[str, dict[int, float]]:
    steps = range(STEPS)
    found: dict[str, dict[int, float]] = {
        "reduced_train_loss": {
            s: 4.0 + 0.6 * math.exp(-s / 25) + 0.05 * math.sin(7.0 * s) for s in steps
        },
        "val_loss": {49: 4.12, 99: 4.05 if experts else 4.07},
        "lr": {s: 3e-3 * min(1, (s + 1) / 20) * (1 - 0.9 * s / STEPS) for s in steps},
        "mfu": {s: 0.41 + 0.01 * math.sin(s) for s in steps[1:]},
        "global_batch_size": dict.fromkeys(steps, 16.0),
    }
    measured = range(1, STEPS, EVERY) if experts else ()
    for name, first, slope in (
        ("router_entropy", 2.07, -0.004),
        ("expert_distance", 0.0, 0.005),
        ("router_distance", 0.0, 0.007),
    ):
        for layer in range(1, layers):
            tag = f"moe/{name}_layer_{layer}"
            found[tag] = {s: first + slope * s * (0.7 + 0.2 * layer) for s in measured}
        found[f"moe/{name}"] = {s: first + slope * s * (0.8 + 0.1 * layers) for s in measured}
    return {tag: series for tag, series in found.items() if series}

"""Every kind of model that is supported, trained by NeMo: out to transformers and back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.trained.export import export
from tests.distributed.pool import RankPool, nemo_recipe
from tests.distributed.step0 import TOLERANCE
from tests.distributed.trained import KINDS, WEIGHTS, import_ckpt
from tests.distributed.training import train
from tests.tiny import tokens, write_dense
from tests.workspace import VOCAB_SIZE, make_workspace

IDS = tokens(rows=2, length=200, vocab_size=VOCAB_SIZE)
QUICK = ("plain", "everything")


@nemo_recipe
def logits(checkpoint: Path, folding: ParallelFolding, dtype: str | None) -> torch.Tensor:
    """Return Megatron's logits."""
    from nemo_upcycle.evaluation.opening import open_model

    return open_model(checkpoint, folding, dtype)(IDS).logits


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a run, and the dense checkpoint that it began with."""

    checkpoint: Path
    dense: Path


def trained(ranks: RankPool, directory: Path, kind: str) -> Trained:
    """Upcycle and train for three steps with a large learning rate, on 2 ranks."""
    _, family, config, upcycling = KINDS[kind]
    workspace = make_workspace(directory)
    dense = write_dense(
        directory / "dense", family, vocab_size=VOCAB_SIZE, max_position_embeddings=256, **config
    )
    for file in (workspace / "tokenizer").iterdir():
        (dense / file.name).write_bytes(file.read_bytes())
    results = ranks.run(
        train,
        2,
        directory=workspace,
        options={
            "name": "run",
            "dense_checkpoint": str(dense),
            "max_steps": 3,
            "expert_model_parallel_size": 2,
            **upcycling,
        },
        overrides={
            "trainer.limit_val_batches": 0,
            "optim.config.lr": 0.02,
            "optim.lr_scheduler.warmup_steps": 0,
        },
    )
    assert not any(isinstance(result, str) for result in results), results
    (checkpoint,) = (workspace / "run" / "checkpoints").glob("*-last")
    return Trained(checkpoint, dense)


@pytest.mark.parametrize(
    "kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_trained_out_and_back(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    run = trained(ranks, tmp_path, kind)
    exported = tmp_path / "hf"
    export(run.checkpoint, exported)
    _check_learnt(run.dense, exported)
    folding = ParallelFolding(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, expert_model_parallel_size=2
    )
    with torch.no_grad():
        fp32, bf16 = (
            AutoModelForCausalLM.from_pretrained(exported, dtype=dtype)(IDS).logits.float()
            for dtype in (torch.float32, torch.bfloat16)
        )
    for world_size, mapping in ((1, ParallelFolding()), (4, folding)):
        found = ranks.run(
            logits, world_size, checkpoint=run.checkpoint, folding=mapping, dtype=None
        )
        assert (found[-1] - fp32).abs().max() <= TOLERANCE
    (rounded,) = ranks.run(
        logits, 1, checkpoint=run.checkpoint, folding=ParallelFolding(), dtype="bfloat16"
    )
    assert (rounded - bf16).norm() / bf16.norm() <= 2e-2
    ranks.run(import_ckpt, 1, source=exported, output=tmp_path / "nemo")
    export(tmp_path / "nemo", tmp_path / "again")
    for name in (WEIGHTS, "config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes(), name


def _check_learnt(dense: Path, exported: Path) -> None:
    before, after = (load_file(path / WEIGHTS) for path in (dense, exported))
    name = "model.layers.0.self_attn.o_proj.weight"
    assert (after[name] - before[name]).norm() > 0.05 * before[name].norm()
    experts: list[Any] = [
        values for name, values in after.items() if ".layers.1." in name and ".experts." in name
    ]
    shapes = {values.shape for values in experts}
    assert all(not torch.equal(experts[0], other) for other in experts[1:]), shapes

"""Checkpoints of both programs are evaluated where NeMo is not, on any ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.evaluation.opening import open_model
from tests.distributed.pool import RankPool, nemo_recipe
from tests.megatron import formats
from tests.megatron.scenarios import UPCYCLING
from tests.tiny import LLAMA31_ROPE, YARN, tokens, write_dense
from tests.tokenizers import write_tokenizer

TOLERANCE = 1e-5
IDS = tokens(rows=3, length=48)
FAMILIES = {
    "llama": {"rope_scaling": LLAMA31_ROPE, "vocab_size": 321},
    "nemotron": {},
    "qwen2, tied": {},
    "mistral, window": {},
    "granite": {"rope_scaling": YARN},
    "smollm3": {},
}


def saved_run(ranks: RankPool, directory: Path, family: str, program: str) -> tuple[Path, Path]:
    """Return a dense model, and a run of the MoE."""
    dense, run = write_dense(directory / "dense", family, **FAMILIES[family]), directory / "run"
    given = {"dense": dense, "folding": ParallelFolding.of(tp=2, ep=2), "upcycling": UPCYCLING}
    ranks.run(formats.save, 2, run=run, program=program, **given)
    return dense, run


@nemo_recipe
def logits(source: Path, folding: ParallelFolding) -> torch.Tensor:
    """Return a checkpoint's logits as `evaluate` and `verify` compute them."""
    return open_model(source, folding, megatron=True)(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_dense_models(ranks: RankPool, tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    dense, run = saved_run(ranks, tmp_path, family, "Megatron-Bridge")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(IDS).logits
    for world_size, folding in (
        (1, ParallelFolding()),
        (2, ParallelFolding.of(tp=2, ep=2)),
        (2, ParallelFolding.of(pp=2)),
    ):
        for found in ranks.run(logits, world_size, source=run, folding=folding):
            assert float((found - expected).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("program", formats.PROGRAMS)
def test_the_command_finds_them_equal(ranks: RankPool, tmp_path: Path, program: str) -> None:
    dense, run = saved_run(ranks, tmp_path, "llama", program)
    write_tokenizer(tmp_path / "tokenizer", "BPE")
    words = ("verify", dense, run, "--tokens", 256, "--tokenizer", tmp_path / "tokenizer", "--json")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "nemo_upcycle.cli", *map(str, words)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["exact"], found
    assert found["top1"] == 1

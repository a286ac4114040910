"""A GGUF file computes in Megatron what transformers computes from the file."""

from pathlib import Path

import pytest
import torch

from nemo_upcycle.config import UpcyclingConfig
from tests.distributed import scenarios
from tests.distributed.pool import RankPool
from tests.distributed.step0 import FOLDED, IDS, TOLERANCE, opened_logits
from tests.gguf_files import write_gguf
from tests.tiny import write_dense

pytest.importorskip("gguf")


def test_logits_equal_transformers(ranks: RankPool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    dense = write_dense(tmp_path / "dense", "llama")
    source = write_gguf(dense, tmp_path / "gguf" / "tiny.gguf", "Q8_0")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source, gguf_file="tiny.gguf")(IDS).logits
    outputs = ranks.run(
        scenarios.step0_logits,
        4,
        dense=source,
        folding=FOLDED,
        upcycling=UpcyclingConfig(),
        ids=IDS,
        damage=None,
    )
    for positions, found in filter(None, outputs):
        assert (found - expected[:, positions]).abs().max() <= TOLERANCE
    (evaluated,) = ranks.run(opened_logits, 1, source=source, ids=IDS)
    assert (evaluated - expected).abs().max() <= TOLERANCE

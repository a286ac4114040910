"""Every family of dense models computes in Megatron what it computes in transformers."""

from pathlib import Path

import pytest
import torch

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from tests.distributed.pool import RankPool
from tests.distributed.step0 import FOLDED, TOLERANCE, dense_logits, difference
from tests.tiny import FAMILIES, tokens, write_dense


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense"), request.param)


def test_logits_equal_transformers(ranks: RankPool, dense: Path) -> None:
    assert difference(ranks, dense, 4, FOLDED) <= TOLERANCE


def test_the_dense_control_equals_transformers(ranks: RankPool, dense: Path) -> None:
    control = UpcyclingConfig(num_moe_experts=None)
    assert difference(ranks, dense, 1, ParallelFolding(), control) <= TOLERANCE


def test_a_windows_tokens_are_counted_as_transformers_counts_them(tmp_path: Path) -> None:
    """Were the window one too wide or not there, it would show."""
    ids = tokens(rows=2, length=48)
    windows = {"15": 15, "16": 16, "17": 17, "none": None}
    logits = {
        name: dense_logits(write_dense(tmp_path / name, "mistral", sliding_window=window), ids)
        for name, window in windows.items()
    }
    for name in ("15", "17", "none"):
        assert float((logits["16"] - logits[name]).abs().max()) > 100 * TOLERANCE
    assert torch.isfinite(logits["16"]).all()

"""Every family of dense models computes in Megatron what it computes in transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from tests.distributed.pool import RankPool
from tests.distributed.step0 import FOLDED, TOLERANCE, dense_logits, difference
from tests.tiny import FAMILIES, YARN, tokens, write_dense


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


UNLIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "embeddings": ("granite", {"embedding_multiplier": 1.0}),
    "residual": ("granite", {"residual_multiplier": 1.0}),
    "scores": ("granite", {"attention_multiplier": 8**-0.5}),
    "logits": ("granite", {"logits_scaling": 1.0}),
    "YaRN's attention factor": ("llama, YaRN", {"rope_scaling": {**YARN, "attention_factor": 1.0}}),
    "YaRN's rounding": ("llama, YaRN", {"rope_scaling": {**YARN, "truncate": False}}),
    "layers without RoPE": ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}),
    "other layers without RoPE": ("smollm3", {"no_rope_layers": [0, 1, 1, 1]}),
    "the rotated part": ("phi3", {"partial_rotary_factor": 0.5}),
    "the rotated part of a StableLM": ("stablelm", {"partial_rotary_factor": 0.25}),
    "the function of a Gemma": ("gemma", {"hidden_act": "silu"}),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_a_family_has_of_its_own_shows_in_the_logits(tmp_path: Path, name: str) -> None:
    """Were it ignored, the comparison with transformers would fail."""
    family, config = UNLIKE[name]
    ids = tokens(rows=2, length=48)
    usual, unlike = (
        dense_logits(write_dense(tmp_path / each, family, **said), ids)
        for each, said in (("usual", {}), ("unlike", config))
    )
    assert float((usual - unlike).abs().max()) > 100 * TOLERANCE

"""A dense model in FP8 computes what its dequantised weights compute, as in transformers 5."""

import json
from pathlib import Path

import pytest
import torch

from nemo_upcycle.config import UpcyclingConfig
from tests.distributed import scenarios, transformers5
from tests.distributed.pool import RankPool
from tests.distributed.step0 import FOLDED, IDS, TOLERANCE, dense_logits, error
from tests.distributed.test_import import logits
from tests.quantised import write_fp8


@pytest.mark.parametrize("way", ["blocks", "compressed-tensors, channel"])
def test_logits_are_those_of_the_dequantised_model(
    ranks: RankPool, dense: Path, tmp_path: Path, way: str
) -> None:
    plain = write_fp8(dense, tmp_path / "fp8", way, torch.float32)
    outputs = ranks.run(
        scenarios.step0_logits,
        4,
        dense=tmp_path / "fp8",
        folding=FOLDED,
        upcycling=UpcyclingConfig(),
        ids=IDS,
        damage=None,
    )
    assert error(outputs, plain, IDS) <= TOLERANCE
    (evaluated,) = ranks.run(logits, 1, source=tmp_path / "fp8", ids=IDS)
    assert (evaluated - dense_logits(plain, IDS)).abs().max() <= TOLERANCE


def test_transformers_5_dequantises_alike(
    transformers_5: Path, dense: Path, tmp_path: Path
) -> None:
    ways = {name: tmp_path / str(i) for i, name in enumerate(("blocks", "one scale per tensor"))}
    plain = {name: write_fp8(dense, path, name, torch.float32) for name, path in ways.items()}
    torch.save(IDS, tmp_path / "ids")
    arguments = (
        json.dumps(list(map(str, ways.values()))),
        *map(str, (tmp_path / "ids", tmp_path / "out")),
    )
    transformers5.end(transformers5.start(transformers_5, transformers5.LOGITS, *arguments))
    found = torch.load(tmp_path / "out")
    for name, path in ways.items():
        assert (found[str(path)] - dense_logits(plain[name], IDS)).abs().max() <= TOLERANCE

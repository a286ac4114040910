"""A dense model in FP8 computes what its dequantized weights compute, as in transformers 5."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_upcycle.config import UpcyclingConfig
from tests.distributed import scenarios, transformers5
from tests.distributed.pool import RankPool
from tests.distributed.step0 import FOLDED, IDS, TOLERANCE, dense_logits, error, opened_logits
from tests.quantized import write_fp8


@pytest.mark.parametrize("way", ["blocks", "compressed-tensors, channel"])
def test_logits_are_those_of_the_dequantized_model(
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
    (evaluated,) = ranks.run(opened_logits, 1, source=tmp_path / "fp8", ids=IDS)
    assert (evaluated - dense_logits(plain, IDS)).abs().max() <= TOLERANCE


DEQUANTIZED = """
import sys, torch, transformers
assert transformers.__version__ >= "5", transformers.__version__
for directory in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    torch.save(model.state_dict(), directory + "/dequantized")
"""
WAYS = ("blocks", "blocks, scales in bf16", "one scale per tensor")


@pytest.mark.thorough
def test_transformers_5_dequantizes_alike(
    transformers_5: Path, dense: Path, tmp_path: Path
) -> None:
    """Without a GPU, transformers 5 dequantizes as it loads."""
    ways = {name: tmp_path / str(number) for number, name in enumerate(WAYS)}
    plain = {name: write_fp8(dense, path, name) for name, path in ways.items()}
    transformers5.end(transformers5.start(transformers_5, DEQUANTIZED, *map(str, ways.values())))
    for name, path in ways.items():
        expected, found = (
            load_file(plain[name] / "model.safetensors"),
            torch.load(path / "dequantized"),
        )
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[each], expected[each]) for each in expected), name

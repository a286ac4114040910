"""Layers computed by transformers 5 are those that transformers 4 computes."""

from pathlib import Path

import pytest
import torch

from nemo_upcycle.calibration.layer import DenseLayer
from nemo_upcycle.checkpoint.branches import open_branches
from tests.distributed import transformers5
from tests.tiny import FAMILIES, write_dense

LAYERS = """
import sys, torch, transformers
assert transformers.__version__ >= "5", transformers.__version__
from nemo_upcycle.calibration.layer import DenseLayer, check_computable
from nemo_upcycle.checkpoint.branches import open_branches
*directories, given, out = sys.argv[1:]
hidden, found = torch.load(given), {}
for directory in directories:
    checkpoint = open_branches(directory)
    check_computable(checkpoint)
    seen = DenseLayer(checkpoint, 1, 0, torch.device("cpu")).compute(hidden)
    found[directory] = (seen.inputs, seen.neurons, seen.outputs)
torch.save(found, out)
"""


def test_layers_are_those_of_transformers_4(tmp_path: Path) -> None:
    target = transformers5.install()
    if target is None:
        pytest.skip("transformers 5 cannot be installed here")
    directories = [str(write_dense(tmp_path / family, family)) for family in FAMILIES]
    hidden = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    torch.save(hidden, tmp_path / "hidden")
    files = (str(tmp_path / "hidden"), str(tmp_path / "found"))
    transformers5.end(transformers5.start(target, LAYERS, *directories, *files))
    for directory, found in torch.load(tmp_path / "found").items():
        layer = DenseLayer(open_branches(directory), 1, 0, torch.device("cpu"))
        expected = layer.compute(hidden)
        for ours, theirs in zip(vars(expected).values(), found, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5), directory

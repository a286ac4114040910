"""transformers 5 loads what is exported, and what it saves is read back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.export import export
from nemo_upcycle.trained import open_trained
from tests.distributed.pool import RankPool
from tests.distributed.test_export import IDS, KINDS, trained
from tests.distributed.test_step0 import TOLERANCE

LOAD_AND_SAVE = """
import sys, torch, transformers
assert transformers.__version__ >= "5", transformers.__version__
ids = torch.load(sys.argv[2])
model, loading = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.float32, output_loading_info=True
)
assert not any(loading.values()), loading
with torch.no_grad():
    torch.save(model(ids).logits, sys.argv[3])
model.save_pretrained(sys.argv[4])
"""


@pytest.fixture(scope="module")
def transformers5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with transformers 5, to be put before what is installed."""
    target = tmp_path_factory.mktemp("transformers5")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(target)]
    if subprocess.run([*pip, "transformers>=5,<6"], capture_output=True, timeout=600).returncode:
        pytest.skip("transformers 5 cannot be installed here")
    return target


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(ranks: RankPool, transformers5: Path, tmp_path: Path, kind: str) -> None:
    saved, ((_, expected),) = trained(ranks, tmp_path, kind, ParallelFolding(), 1)
    export(saved, tmp_path / "hf")
    torch.save(IDS, tmp_path / "ids")
    arguments = [str(tmp_path / name) for name in ("hf", "ids", "logits", "again")]
    result = subprocess.run(
        [sys.executable, "-c", LOAD_AND_SAVE, *arguments],
        env=os.environ | {"PYTHONPATH": str(transformers5)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert (torch.load(tmp_path / "logits") - expected).abs().max() <= TOLERANCE
    assert open_trained(tmp_path / "again").model == open_trained(tmp_path / "hf").model
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

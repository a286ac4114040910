"""transformers 5 loads what is exported, saves what is read back, and has the same defaults."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.export import export
from nemo_upcycle.mapping.defaults import DEFAULTS
from nemo_upcycle.trained import open_trained
from tests.distributed import transformers5
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(ranks: RankPool, transformers_5: Path, tmp_path: Path, kind: str) -> None:
    saved, ((_, expected),) = trained(ranks, tmp_path, kind, ParallelFolding(), 1)
    export(saved, tmp_path / "hf")
    torch.save(IDS, tmp_path / "ids")
    arguments = [str(tmp_path / name) for name in ("hf", "ids", "logits", "again")]
    transformers5.end(transformers5.start(transformers_5, LOAD_AND_SAVE, *arguments))
    assert (torch.load(tmp_path / "logits") - expected).abs().max() <= TOLERANCE
    assert open_trained(tmp_path / "again").model == open_trained(tmp_path / "hf").model
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_defaults_are_those_of_transformers_5(transformers_5: Path) -> None:
    process = transformers5.start(transformers_5, transformers5.DEFAULTS, *DEFAULTS)
    found = json.loads(transformers5.end(process).splitlines()[-1])
    for family, ours in DEFAULTS.items():
        assert ours == {key: found[family][key] for key in ours}, family

"""The example of a NeMo script with a trainer of one's own."""

import runpy
import sys
from pathlib import Path

import pytest

from nemo_upcycle.checkpoint import open_checkpoint
from nemo_upcycle.trained.drift import drift
from nemo_upcycle.trained.opened import open_trained
from tests.distributed.pool import RankPool, nemo_recipe
from tests.workspace import make_workspace

SCRIPT = Path(__file__).parents[2] / "examples" / "own_trainer.py"


@nemo_recipe
def run_script(words: list[str]) -> None:
    sys.argv = [str(SCRIPT), *words]
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.parametrize("world_size", [1, 2])
def test_it_upcycles_trains_and_saves(ranks: RankPool, tmp_path: Path, world_size: int) -> None:
    make_workspace(tmp_path)
    dense, runs = tmp_path / "dense_hf", tmp_path / "runs"
    words = [str(dense), str(tmp_path / "data" / "sources"), str(runs)]
    ranks.run(run_script, world_size, words=words)
    trained = open_trained(runs / "own")
    distance = drift(open_checkpoint(str(dense)), trained)
    assert trained.model.num_experts == 4
    # Ten steps of 1e-4 are little; random weights would be about 1 apart.
    assert 1e-6 < distance.experts < 0.1
    assert 1e-6 < distance.others < 0.1

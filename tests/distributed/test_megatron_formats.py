"""MoEs that Megatron-LM and Megatron-Bridge have saved are exported, imported and compared."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from nemo_upcycle.cli import app
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.trained.export import export
from tests.distributed.megatron_dense import save_moe
from tests.distributed.pool import RankPool, nemo_recipe
from tests.distributed.step0 import TOLERANCE, dense_logits
from tests.distributed.trained import WEIGHTS, import_ckpt
from tests.tiny import tokens, write_llama

IDS = tokens(rows=2, length=32)


@nemo_recipe
def logits(source: Path, folding: ParallelFolding) -> torch.Tensor:
    from nemo_upcycle.evaluation.opening import open_model

    with torch.no_grad():
        return open_model(source, folding)(input_ids=IDS).logits


@pytest.mark.parametrize("program", ["Megatron-LM", "Megatron-Bridge"])
def test_the_commands_of_nemos_environment(ranks: RankPool, tmp_path: Path, program: str) -> None:
    dense, run = write_llama(tmp_path / "dense"), tmp_path / "run"
    folding = ParallelFolding.of(tp=2, ep=2)
    given = {"dense": dense, "upcycling": UpcyclingConfig(), "directory": run, "program": program}
    ranks.run(save_moe, 2, folding=folding, **given)
    expected = dense_logits(dense, IDS)
    for found in ranks.run(logits, 2, source=run, folding=folding):
        assert (found - expected).abs().max() <= TOLERANCE
    done = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "exported")])
    assert done.exit_code == 0, done.output
    ranks.run(import_ckpt, 1, source=run, output=tmp_path / "nemo")
    export(tmp_path / "nemo", tmp_path / "again")
    for name in (WEIGHTS, "config.json"):
        first, again = ((tmp_path / each / name).read_bytes() for each in ("exported", "again"))
        assert first == again, name
    assert json.loads((tmp_path / "again" / "config.json").read_text())["num_local_experts"] == 8

"""The recipe `upcycle` trains: any dense checkpoint, upcycled and as the dense control."""

from pathlib import Path

import pytest

from tests.distributed.pool import RankPool
from tests.distributed.training import WITHOUT_LEARNING, train
from tests.workspace import make_workspace


def test_upcycled_and_control_train_and_begin_alike(ranks: RankPool, tmp_path: Path) -> None:
    """With learning rate 0 both compute the dense model, on 2 ranks with the experts spread."""
    workspace, losses = make_workspace(tmp_path), []
    for name, values in (("moe", {}), ("control", {"num_moe_experts": None})):
        results = ranks.run(
            train,
            2,
            directory=workspace,
            options={
                "name": name,
                "dense_checkpoint": str(workspace / "dense_hf"),
                "data_paths": f"{workspace / 'data' / 'documentation'}",
                "max_steps": 2,
                "accelerator": "cpu",
                **values,
            },
            overrides=WITHOUT_LEARNING,
            factory="upcycle",
        )
        assert not [result for result in results if isinstance(result, str)]
        spread = {len([s for s, _ in shards if ".experts." in s.name]) for _, shards in results}
        assert len(spread) == 1
        assert (spread == {0}) is (name == "control")
        losses.append(results[0][0])
    moe, control = losses
    assert len(moe) == 2
    assert moe == pytest.approx(control, rel=1e-6)

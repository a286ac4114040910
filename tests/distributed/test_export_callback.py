"""Hugging Face directories that a run writes beside its checkpoints."""

import shutil
from pathlib import Path

import pytest

from nemo_upcycle.trained.export import export
from tests.distributed.pool import RankPool
from tests.distributed.training import EP2, train
from tests.workspace import make_workspace

OVERRIDES = {
    "trainer.limit_val_batches": 0,
    "data.global_batch_size": 4,
    "data.micro_batch_size": 2,
    "log.ckpt.every_n_train_steps": 1,
}


def run(ranks: RankPool, directory: Path, name: str, max_steps: int, every_n: int) -> Path:
    """Train for some steps with exports; return the directory of the exports."""
    options = {"name": name, "max_steps": max_steps, "export_every_n": every_n, **EP2}
    for result in ranks.run(train, 2, directory=directory, options=options, overrides=OVERRIDES):
        assert not isinstance(result, str), result
    return directory / name / "hf"


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.thorough
def test_every_nth_checkpoint_what_is_missing_and_the_last_are_exported(
    ranks: RankPool, tmp_path: Path
) -> None:
    make_workspace(tmp_path)
    exported = run(ranks, tmp_path, "run", max_steps=4, every_n=2)
    assert names(exported) == ["step=1", "step=3"]
    expected = files(exported / "step=3")
    shutil.rmtree(exported / "step=3")

    run(ranks, tmp_path, "run", max_steps=5, every_n=2)  # a resume
    assert names(exported) == ["step=1", "step=3", "step=4"]
    assert files(exported / "step=3") == expected
    weights = [files(exported / name)["model.safetensors"] for name in names(exported)]
    assert len(set(weights)) == 3
    export(tmp_path / "run", tmp_path / "last")
    assert files(exported / "step=4") == files(tmp_path / "last")

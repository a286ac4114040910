"""A run's directory stands for its last complete checkpoint."""

import os
from pathlib import Path

import pytest

from nemo_upcycle.checkpoint.run_directory import checkpoints_of, is_complete, resolve_trained
from nemo_upcycle.errors import UpcyclingError

NAME = "model_name=0--val_loss=0.00-step={}-consumed_samples={}.0"


def save(run: Path, step: int, last: bool = True, written: bool = True) -> Path:
    """Lay a checkpoint out as NeMo does."""
    name = NAME.format(step, 8 * step) + ("-last" if last else "")
    weights = run / "checkpoints" / name / "weights"
    weights.mkdir(parents=True)
    (weights / "common.pt").write_bytes(b"")
    if written:
        (weights / "metadata.json").write_text("{}")
    return weights.parent


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_the_last_by_its_step_not_by_its_time(run: Path) -> None:
    """Steps count as numbers, and a copy makes all of one time."""
    first, tenth = save(run, 9), save(run, 10)
    os.utime(first, (2e9, 2e9))
    for source in (run, run / "checkpoints", str(run)):
        assert resolve_trained(source) == tenth
    assert checkpoints_of(run) == [first, tenth]


def test_of_one_step_the_last_one(run: Path) -> None:
    saved = [save(run, 5, last=last) for last in (False, True)]
    assert resolve_trained(run) == saved[1]


def test_what_is_not_complete_is_passed_over(run: Path) -> None:
    whole, unmarked = save(run, 1), save(run, 2)
    marker = unmarked.with_name(unmarked.name + "-unfinished")
    marker.touch()
    save(run, 3, written=False)
    assert resolve_trained(run) == whole
    marker.unlink()
    assert resolve_trained(run) == unmarked
    assert not is_complete(run)


def test_a_run_without_a_complete_checkpoint(run: Path) -> None:
    save(run, 1, written=False)
    with pytest.raises(UpcyclingError, match="a run without a complete checkpoint"):
        resolve_trained(run)


@pytest.mark.parametrize("file", ["config.json", "weights/.metadata", ".metadata"])
def test_a_checkpoint_is_itself(tmp_path: Path, file: str) -> None:
    """Also one that trainers keep their own checkpoints in."""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    save(tmp_path, 7)
    assert resolve_trained(tmp_path) == tmp_path


def test_what_is_no_run_is_left_to_whoever_opens_it(tmp_path: Path) -> None:
    assert resolve_trained(tmp_path) == tmp_path
    with pytest.raises(UpcyclingError, match="No dense checkpoint at"):
        resolve_trained(tmp_path / "nothing")

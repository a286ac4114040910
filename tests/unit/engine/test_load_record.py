"""The record of experts' loads: continued after a kill, without a step twice."""

from pathlib import Path

import numpy as np
import pytest

from nemo_upcycle.engine.heat_map import SNAPSHOTS, draw, grid
from nemo_upcycle.engine.load_record import LoadRecord, Loads, read_loads, thinned
from nemo_upcycle.errors import UpcyclingError


def at(step: int, first: float = 0.25) -> Loads:
    return Loads(step, (None, (first, 1 - first), (0.5, 0.5)))


def written(path: Path, *steps: int) -> LoadRecord:
    record = LoadRecord(path)
    record.begin(0)
    for step in steps:
        record.add(at(step))
    return record


def test_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "health" / "load.jsonl"
    assert read_loads(path) == []
    written(path, 1, 11)
    assert read_loads(path) == [at(1), at(11)]
    assert at(1).relative == {1: [0.5, 1.5], 2: [1.0, 1.0]}


def test_a_killed_run_goes_on_without_a_step_twice(tmp_path: Path) -> None:
    path = tmp_path / "load.jsonl"
    written(path, 1, 11, 21)
    with path.open("a") as file:
        file.write('{"step":31,"load":[[0.1')  # killed here
    record = LoadRecord(path)
    record.begin(11)  # the last checkpoint
    for step in (21, 31):
        record.add(at(step, first=0.125))
    assert read_loads(path) == [at(1), at(11), at(21, 0.125), at(31, 0.125)]


def test_a_new_run_forgets_an_earlier_one(tmp_path: Path) -> None:
    written(tmp_path / "load.jsonl", 1, 11)
    written(tmp_path / "load.jsonl", 1)
    assert read_loads(tmp_path / "load.jsonl") == [at(1)]


@pytest.mark.parametrize("line", ["[]", "{", '{"step": 1}', '{"step": 1, "load": [["a"]]}', "\0"])
def test_a_damaged_line_is_named_and_stops_no_training(tmp_path: Path, line: str) -> None:
    path = tmp_path / "load.jsonl"
    written(path, 1)
    with path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UpcyclingError, match=r"load\.jsonl, line 2 is no measurement"):
        read_loads(path)
    record = LoadRecord(path)
    with pytest.warns(UserWarning, match="starts anew"):
        record.begin(5)
    record.add(at(6))
    assert read_loads(path) == [at(6)]


def test_a_full_disk_ends_the_record_and_not_the_training(tmp_path: Path) -> None:
    path = tmp_path / "load.jsonl"
    record = written(path, 1)
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match="is not recorded from here on"):
        record.add(at(2))
    record.add(at(3))  # says it once


def test_a_long_run_is_thinned_evenly(tmp_path: Path) -> None:
    loads = [at(step, first=0.5) for step in range(3 * SNAPSHOTS + 1)]
    steps = [each.step for each in thinned(loads, SNAPSHOTS)]
    assert len(steps) <= SNAPSHOTS
    assert set(np.diff(steps)) == {4}
    assert thinned(loads[:5], SNAPSHOTS) == loads[:5]
    assert grid(loads).shape == (2, 2, len(loads))
    assert (grid(loads) == 1).all()
    draw([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    draw(loads, tmp_path / "some.png")
    assert (tmp_path / "some.png").stat().st_size > 5_000

"""The hardware file of a check, as the planner reads it."""

from pathlib import Path

import pytest

from nemo_upcycle.check import bandwidth
from nemo_upcycle.check.findings import Bandwidth
from nemo_upcycle.planner.efficiency import CALIBRATED
from nemo_upcycle.planner.hardware import hardware
from nemo_upcycle.planner.machine import GIGA, Machine

H100 = hardware("h100")
MEASURED = [
    Bandwidth("all-reduce", False, False, 8, 300.0),
    Bandwidth("all-gather", False, False, 8, 340.0),
    Bandwidth("all-to-all", False, False, 8, 320.0),
    Bandwidth("all-gather", True, True, 2, 40.0),
    Bandwidth("all-to-all", True, True, 2, 20.0),
]


def written(found: list[Bandwidth], path: Path) -> Machine:
    bandwidth.write_hardware(H100, found, 4, path)
    return Machine(hardware(str(path)), CALIBRATED)


def test_the_planner_counts_with_what_was_measured(tmp_path: Path) -> None:
    machine = written(MEASURED, tmp_path / "hardware.yaml")
    assert machine.nvlink / GIGA == pytest.approx(320.0, rel=1e-3)
    assert machine.network / GIGA == pytest.approx(20.0, rel=1e-3)
    assert machine.hardware.gpus_per_node == 4
    assert machine.hardware.peak_tflops == H100.peak_tflops


def test_what_was_not_measured_is_the_data_sheets(tmp_path: Path) -> None:
    machine = written(MEASURED[:3], tmp_path / "hardware.yaml")
    assert machine.hardware.network_bandwidth == H100.network_bandwidth
    assert "network_bandwidth: not measured" in (tmp_path / "hardware.yaml").read_text()


@pytest.mark.parametrize(("measured", "passed"), [(0.51, True), (0.49, False)])
def test_slow_collectives_of_gpus_fail(
    monkeypatch: pytest.MonkeyPatch, measured: float, passed: bool
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    found = [Bandwidth("all-gather", True, True, 2, measured * 30.0, 30.0)]
    (finding,) = bandwidth.findings(found)
    assert finding.passed is passed
    assert "15.0 GB/s" in finding.expected


def test_groups_are_nodes_and_ranks_of_all_nodes() -> None:
    groups = dict(bandwidth._groups(8, 4))
    assert groups[False] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups[True] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert dict(bandwidth._groups(2, 2)) == {False: [[0, 1]]}
    assert dict(bandwidth._groups(2, 1)) == {True: [[0, 1]]}
    assert dict(bandwidth._groups(1, 1)) == {}

"""What is said of ranks that failed."""

from pathlib import Path

import pytest

from tests.torchrun import REPORT


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ({"0": "bad", "1": "bad"}, ["Error: bad"]),
        ({"1": "bad"}, ["Error: bad"]),
        ({"0": "lost", "10": "bad", "2": "lost"}, ["Error: rank 0,2: lost", "Error: rank 10: bad"]),
    ],
    ids=["all", "one", "several"],
)
def test_what_ranks_leave_is_said_once(
    tmp_path: Path, left: dict[str, str], said: list[str], capsys: pytest.CaptureFixture
) -> None:
    from nemo_upcycle.engine.launch import _report_errors

    for rank, message in left.items():
        (tmp_path / rank).write_text(message)
    _report_errors(tmp_path)
    assert capsys.readouterr().err.splitlines() == said


def test_a_killed_rank_is_found_in_torchruns_report() -> None:
    from nemo_upcycle.engine.launch import killed, killed_ranks

    assert killed_ranks(REPORT) == [1]
    assert killed_ranks(REPORT.replace("-9 (", "-11 (")) == []
    assert killed([1]).startswith("rank 1 was killed by SIGKILL (exit code -9).")
    assert killed([0, 1], "It needs 4 GiB.").endswith("It needs 4 GiB.")

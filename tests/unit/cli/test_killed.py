"""A rank that the kernel killed is named at the end of `nemo`."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_upcycle.cli import killed
from tests.torchrun import REPORT


@pytest.mark.parametrize(
    ("code", "log", "named"),
    [
        (1, REPORT, True),
        (0, REPORT, False),
        (1, REPORT.replace("-9", "-11"), False),
        (1, "", False),
    ],
    ids=["killed", "succeeded", "another signal", "no report"],
)
def test_a_killed_rank_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
    code: int,
    log: str,
    named: bool,
) -> None:
    (tmp_path / "stderr.log").write_text(log)
    launcher = SimpleNamespace(poll=lambda: code)
    monkeypatch.setattr(killed, "_jobs", [(launcher, tmp_path / "stderr.log")])
    killed._report()
    said = capfd.readouterr().err
    assert ("rank 1 was killed by SIGKILL (exit code -9). Most likely the kernel" in said) is named

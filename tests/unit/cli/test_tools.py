"""What commands share: one line for errors of users and of the machine."""

import errno
import runpy
from pathlib import Path

import pytest
import typer

from nemo_upcycle.cli import tools
from nemo_upcycle.errors import UpcyclingError


def ended(error: BaseException) -> int:
    """Return the exit code of a command that raises."""

    @tools.one_line_errors
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as caught:
        command()
    return caught.value.exit_code


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UpcyclingError("bad input"), "Error: bad input"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/data/x"),
            "Error: /data/x: Permission denied.",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "Error: No space left on device."),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
            "Error: x: No such file",
        ),
    ],
    ids=["input", "permission", "full disk", "no file"],
)
def test_errors_of_users_and_machines_are_one_line(
    error: Exception, said: str, capsys: pytest.CaptureFixture
) -> None:
    assert ended(error) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(said)


def test_an_interrupt_is_one_line(capsys: pytest.CaptureFixture) -> None:
    assert ended(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.strip() == "Error: interrupted."


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), ValueError("x"), OSError("of a library"), OSError(errno.EPIPE, "Broken pipe")],
    ids=repr,
)
def test_faults_of_the_program_keep_their_traceback(error: Exception) -> None:
    @tools.one_line_errors
    def command() -> None:
        raise error

    with pytest.raises(type(error)):
        command()


def test_a_rank_leaves_its_error_to_the_first_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv(tools.ERRORS, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    assert ended(UpcyclingError("bad input")) == 1
    assert (tmp_path / "3").read_text() == "bad input"
    assert not capsys.readouterr().err


def test_a_run_stands_for_its_last_checkpoint_and_the_ranks_take_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def save(name: str) -> Path:
        checkpoint = tmp_path / "run" / "checkpoints" / name
        (checkpoint / "weights").mkdir(parents=True)
        (checkpoint / "weights" / "metadata.json").write_text("{}")
        return checkpoint

    monkeypatch.setattr(tools, "_taken", {})
    monkeypatch.setenv(tools.TAKEN, "{}")
    monkeypatch.delenv(tools.TAKEN)
    first = save("model--step=1-last")
    assert tools.last_checkpoint(tmp_path / "run") == first
    said = capsys.readouterr().err
    assert "taking its last complete checkpoint, model--step=1-last" in said
    tools.hand_over()
    save("model--step=2-last")  # the run goes on
    assert tools.last_checkpoint(tmp_path / "run") == first
    assert not capsys.readouterr().err


def test_a_process_that_is_spawned_for_saving_runs_no_command() -> None:
    runpy.run_module("nemo_upcycle.cli", run_name="__mp_main__")

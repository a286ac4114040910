"""What commands share: one line for users' errors and the machine's, scores that are not lost."""

import errno
import json
import re
import tempfile
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


def test_scores_that_cannot_be_written_are_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from nemo_upcycle.evaluation.harness import Written

    (tmp_path / "file").write_text("")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    written = Written(tmp_path / "file" / "out")
    written.text("scores.md", "0.5")
    (found,) = (tmp_path / "scratch").rglob("scores.md")
    assert found.read_text() == "0.5"
    assert written.files == [found]
    with pytest.raises(UpcyclingError, match=f"could not be written .*it is in {found.parent}"):
        written.check()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    written.text("results.json", '{"acc": 0.25}')
    assert '{"acc": 0.25}' in capsys.readouterr().out
    with pytest.raises(UpcyclingError, match="it is printed above"):
        written.check()


def test_what_was_cut_otherwise_is_told() -> None:
    from nemo_upcycle.evaluation.scores import markdown
    from nemo_upcycle.evaluation.tasks import Request

    def results(**numbers: int) -> dict:
        return {Request(("x",), None): {"results": {"x": {"acc,none": 0.5}}, "config": numbers}}

    names = ["checkpoint", "dense"]
    same = markdown(names, [results(max_length=64), results(max_length=64)], paper=False)
    assert same.endswith("Rows are cut at 64 tokens.\n")
    other = markdown(names, [results(max_length=64), results(max_length=256)], paper=False)
    assert "64 tokens of the checkpoint and 256 tokens of the dense: longer texts do not" in other
    unknown = markdown(names, [results(max_length=64), results()], paper=False)
    assert "a length of the dense that is not said" in unknown


def test_rows_are_as_long_as_every_model_takes() -> None:
    from nemo_upcycle.evaluation.checks import Described, row_length

    models = [Described("moe", 512, 64), Described("dense", 512, 256), Described("x", 512, None)]
    assert row_length(models) == 64
    assert row_length(models, wanted=32) == 32
    assert row_length(models, earlier=48) == 48
    assert row_length(models, earlier=256) == 64
    assert row_length(models[2:]) is None
    with pytest.raises(UpcyclingError, match="at most the context length of moe, 64"):
        row_length(models, wanted=65)


EARLIER = {
    "results": {"t": {"acc,none": 0.5}},
    "n-shot": {"t": 0},
    "versions": {"t": 1},
    "n-samples": {"t": {"original": 60, "effective": 60}},
    "config": {"limit": None, "apply_chat_template": False, "tokenizer": "a" * 64},
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"config": {"limit": 4}}, "results with --limit 4, and now it is None"),
        ({"config": {"apply_chat_template": True}}, "--apply-chat-template True, and now"),
        ({"config": {}, "chat_template": "{{ x }}"}, "--apply-chat-template True, and now"),
        ({"n-samples": {"t": {"effective": 4}}}, "questions of t 4, and now it is 60"),
        ({"versions": {"t": 2}}, "version of t 2, and now it is 1"),
        ({"n-shot": {"t": 5}}, "shots of t 5, and now it is 0"),
        ({"config": {"tokenizer": "b" * 64}}, "tokenizer bbbbbbbbbbbbbbbb, and now it is aaaa"),
        ({"results": {"t": {"alias": "t"}}}, "has no score of t"),
    ],
)
def test_earlier_results_of_other_questions_are_refused(
    tmp_path: Path, changed: dict, message: str
) -> None:
    from nemo_upcycle.evaluation.harness import Options, check_alike, check_options, read_results
    from nemo_upcycle.evaluation.tasks import Request

    path, request = tmp_path / "dense.json", Request(("t",), None)

    def check(earlier: dict) -> None:
        path.write_text(json.dumps(earlier))
        found = read_results(path, [request])
        check_options(path, found, Options())
        check_alike(path, found, {request: EARLIER})

    check(EARLIER)
    with pytest.raises(UpcyclingError, match=re.escape(message)):
        check(EARLIER | changed)

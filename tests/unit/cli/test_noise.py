"""What is hidden from the screen, and what is not."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from nemo_upcycle.checkpoint.tokenizer_files import TokenizerWarning
from nemo_upcycle.cli import noise

LIBRARY = """
import logging, sys, warnings
print("said at import")
print("also said at import", file=sys.stderr)
warnings.warn("warned at import")
logging.getLogger("anything").warning("logged at import")
def work():
    print("said at work", file=sys.stderr)
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a module that says much when it is imported."""
    name = f"library_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv(noise.VERBOSE, raising=False)
    return name


def test_what_a_library_says_at_import_is_hidden_and_the_rest_shown(
    library: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with noise.hushed():
        module = __import__(library)
        module.work()
        print("a result")
    said = capfd.readouterr()
    assert said.out == "a result\n"
    assert said.err == "said at work\n"


def test_verbose_hides_nothing(
    library: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(noise.VERBOSE, "1")
    with noise.hushed():
        __import__(library)
    said = capfd.readouterr()
    assert "said at import" in said.out
    assert "also said at import" in said.err


def test_a_crash_at_import_shows_what_was_said_and_raises(
    library: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"{library}.py").write_text(f"{LIBRARY}\nraise RuntimeError('broken')\n")
    with pytest.raises(RuntimeError, match="broken"), noise.hushed():
        __import__(library)
    assert "also said at import" in capfd.readouterr().err


def test_everything_is_as_before_afterwards(library: str) -> None:
    before = sys.stdout, sys.stderr, warnings.showwarning, logging.Logger.callHandlers
    with noise.hushed():
        __import__(library)
    assert before == (sys.stdout, sys.stderr, warnings.showwarning, logging.Logger.callHandlers)


@pytest.mark.parametrize(
    ("logger", "level", "text", "shown"),
    [
        ("megatron.core.fusions", logging.WARNING, "this is a fallback", False),
        ("nemo_logger", logging.WARNING, "no version folders", False),
        ("lm_eval.tasks", logging.INFO, "building contexts", False),
        (
            "transformers.x",
            logging.WARNING,
            "You are using the default legacy behaviour of the",
            False,
        ),
        ("transformers.x", logging.WARNING, "Some weights of the model were not used", True),
        ("megatron.core", logging.ERROR, "this cannot be", True),
        ("nemo_logger", logging.WARNING, "file.py:1: UpcyclingWarning: step 0 is not exact", True),
        ("my_model", logging.WARNING, "a word of the user's", True),
    ],
)
def test_records(
    logger: str, level: int, text: str, shown: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with noise.hushed():
        logging.getLogger(logger).log(level, text)
    assert (text in caplog.text) is shown


@pytest.mark.parametrize(
    ("category", "filename", "shown"),
    [
        (UserWarning, "/x/site-packages/megatron/core/a.py", False),
        (UserWarning, "/x/site-packages/transformers/a.py", True),
        (UserWarning, "/x/site-packages/torch/a.py", True),
        (FutureWarning, "/x/site-packages/torch/a.py", False),
        (FutureWarning, "/home/user/model.py", True),
        (UserWarning, "/home/user/model.py", True),
        (TokenizerWarning, "/x/site-packages/megatron/core/a.py", True),
    ],
)
def test_warnings(
    category: type[Warning], filename: str, shown: bool, recwarn: pytest.WarningsRecorder
) -> None:
    with noise.hushed():
        warnings.warn_explicit("careful", category, filename, 1)
    assert len(recwarn) == shown


def test_what_a_command_prints_is_never_compared(capfd: pytest.CaptureFixture[str]) -> None:
    with noise.hushed():
        print("this function has reached end of life")
    assert capfd.readouterr().out == "this function has reached end of life\n"


@pytest.mark.parametrize(
    ("arguments", "kept", "verbose"),
    [
        (["-v", "export", "A", "B"], ["export", "A", "B"], True),
        (["export", "A", "B", "--verbose"], ["export", "A", "B"], True),
        (["generate", "A", "--", "-v"], ["generate", "A", "--", "-v"], False),
        (["plan"], ["plan"], False),
    ],
)
def test_the_option_is_taken_anywhere(
    arguments: list[str], kept: list[str], verbose: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(noise.VERBOSE, "0")
    assert noise.take_option(arguments) == kept
    assert noise.verbose() is verbose


def test_the_command_takes_it_too() -> None:
    words = [sys.executable, "-m", "nemo_upcycle.cli", "version", "-v"]
    subprocess.run(words, check=True, capture_output=True)

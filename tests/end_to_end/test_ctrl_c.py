"""Ctrl-C on the real command, as a terminal does it, to the whole group; and other signals."""

import contextlib
import getpass
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from nemo_upcycle.checkpoint.run_directory import is_complete
from tests import progress
from tests.end_to_end import cli
from tests.workspace import make_workspace

STEPS = 200
COMMAND = (
    "nemo",
    "llm",
    "pretrain",
    "--factory",
    "llama_tiny_e8t2(max_steps={steps},expert_model_parallel_size={ranks})",
    "trainer.limit_val_batches=0",
    "data.global_batch_size=8",
    "run.executor=cpu",
    "run.executor.ntasks_per_node={ranks}",
    "--yes",
)


def words(ranks: int, steps: int = STEPS) -> list[str]:
    return [word.format(ranks=ranks, steps=steps) for word in COMMAND]


def press(
    directory: Path, ranks: int, when: str, number: signal.Signals = signal.SIGINT
) -> tuple[int, str]:
    """Start the command, press Ctrl-C once a line is there; return the exit code and the log.

    Another signal comes to the command alone.
    """
    log = directory / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            cli.command(*words(ranks)),
            cwd=directory,
            env=cli.environment(),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    progress.until(
        lambda: when in log.read_text(errors="replace") or process.poll() is not None,
        [process.pid],
    )
    assert process.poll() is None and when in log.read_text(), log.read_text()[-3000:]
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    return progress.exit_code(process), log.read_text(errors="replace")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 1])
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path, ranks: int) -> None:
    make_workspace(tmp_path / "demo")
    code, log = press(tmp_path, ranks, "iteration 2/")
    assert code == 130
    assert "the ranks save at the end of their step and stop" in log
    assert "[preemption] Ctrl-C: step " in log
    (saved,) = (tmp_path / "demo" / "e8t2" / "checkpoints").glob("*-last")
    step = int(saved.name.split("step=")[1].split("-")[0])
    output = cli.run(tmp_path, *words(ranks, steps=step + 3))
    assert "not upcycling again" in output
    assert "[resume] trainer.max_steps 200 →" in output
    assert len(list(saved.parent.glob(f"*-step={step + 2}-*-last"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGKILL, -signal.SIGKILL)],
    ids=["SIGTERM", "SIGHUP", "SIGKILL"],
)
def test_what_ends_nemo_lets_the_ranks_save(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    make_workspace(tmp_path / "demo")
    found, log = press(tmp_path, 2, "iteration 2/", number)
    assert found == code, log[-3000:]
    if number == signal.SIGKILL:  # the ranks go on for a while
        progress.until(lambda: not processes_in(tmp_path), processes_in(tmp_path))
    assert not processes_in(tmp_path)
    (saved,) = (tmp_path / "demo" / "e8t2" / "checkpoints").glob("*-last")
    assert is_complete(saved)


@pytest.mark.slow
def test_ctrl_c_before_training_leaves_nothing(tmp_path: Path) -> None:
    make_workspace(tmp_path / "demo")
    code, log = press(tmp_path, 2, "The whole output goes to")
    assert code == 130
    assert "there was nothing to save" in log
    assert "Traceback" not in log
    assert not list((tmp_path / "demo").glob("e8t2/checkpoints/*"))


def processes_in(directory: Path) -> list[int]:
    """Return the processes that work in a directory."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(directory):
                found.append(process.pid)
    return found


def processes_of(word: str) -> list[int]:
    """Return the processes that have a word in their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if word.encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 8])
def test_ctrl_c_on_the_ranks_of_a_command(tmp_path: Path, seconds: int) -> None:
    """Pressed as the ranks begin, and as the ranks work: one line, and nothing is left."""
    dense = make_workspace(tmp_path / "demo") / "dense_hf"
    (tmp_path / "tmp").mkdir()
    out = tmp_path / "out" / "text"
    words = ["generate", str(dense), "x", "--max-new-tokens", "250", "--tp", "2", "--out", str(out)]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            cli.command("nemo-upcycle", *words),
            env=cli.environment() | {"TMPDIR": str(tmp_path / "tmp")},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    while len(processes_of(str(out))) < 3:
        assert process.poll() is None, log.read_text()
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    assert progress.exit_code(process) == 130
    assert log.read_text().strip() == "Error: interrupted."
    assert not processes_of(str(out))
    assert not (tmp_path / "out").exists()
    left = [path.name for path in (tmp_path / "tmp").iterdir()]
    left = [name for name in left if not name.startswith(f"nemo-upcycle-{os.getuid()}-")]
    assert set(left) <= {f"torchinductor_{getpass.getuser()}"}  # torch's own cache

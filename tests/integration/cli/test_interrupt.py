"""What ends `nemo` reaches the ranks, with stand-ins for NeMo-Run, torchrun and ranks."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import progress
from tests.thorough import thorough

RANK = """
import signal, sys, time
from pathlib import Path
def stop(number, frame):
    Path(sys.argv[1]).write_text(f"signal {number}")
    sys.exit(128 + number)
if sys.argv[2] == "trains":
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop if sys.argv[3] == "saves" else signal.SIG_IGN)
Path(sys.argv[1]).write_text("ready")
time.sleep(300)
"""
TORCHRUN = """
import signal, subprocess, sys
rank = subprocess.Popen([sys.executable, *sys.argv[1:]], start_new_session=True)
signal.signal(signal.SIGTERM, lambda *_: rank.terminate())
sys.exit(rank.wait())
"""
NEMO = """
import subprocess, sys
from types import ModuleType
local = ModuleType("nemo_run.run.torchx_backend.schedulers.local")
local.PersistentLocalScheduler = type("PersistentLocalScheduler", (), {"schedule": None})
sys.modules[local.__name__] = local  # importing NeMo-Run takes 5 s
from nemo_upcycle.cli import interrupt
interrupt.listen()
launched = subprocess.Popen([sys.executable, *sys.argv[1:]], start_new_session=True)
interrupt.remember(launched)
launched.wait()
print("NeMo-Run ends", flush=True)
"""


class Command:
    """`nemo`, in a process group of its own, and what its rank does."""

    def __init__(self, directory: Path, *rank: str) -> None:
        for name, text in {"rank": RANK, "torchrun": TORCHRUN, "nemo": NEMO}.items():
            (directory / f"{name}.py").write_text(text)
        self.state = directory / "state"
        words = [directory / "nemo.py", directory / "torchrun.py", directory / "rank.py"]
        self.process = subprocess.Popen(
            [sys.executable, *words, self.state, *rank],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        while not self.state.exists() or not self.state.read_text():
            assert self.process.poll() is None
            time.sleep(0.02)

    def ctrl_c(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> tuple[int, str]:
        code = progress.exit_code(self.process)
        return code, self.process.communicate()[0]


def all_end(processes: list[psutil.Process]) -> bool:
    """Wait for processes that are to end."""
    pids = [process.pid for process in processes]
    return progress.until(lambda: not psutil.wait_procs(processes, timeout=0)[1], pids)


def test_ranks_that_train_are_told(tmp_path: Path) -> None:
    command = Command(tmp_path, "trains", "saves")
    command.ctrl_c()
    code, output = command.end()
    assert "the ranks save at the end of their step and stop" in output
    assert "NeMo-Run ends" in output
    assert code == 130
    assert command.state.read_text() == f"signal {signal.SIGINT:d}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_ranks_that_train_are_told_of_a_schedulers_signal(
    tmp_path: Path, number: signal.Signals
) -> None:
    """And `nemo` waits for them; nothing is left."""
    command = Command(tmp_path, "trains", "saves")
    started = command.descendants()
    command.process.send_signal(number)
    code, output = command.end()
    assert f"{number.name}: the ranks save at the end of their step and stop" in output
    assert "NeMo-Run ends" in output
    assert code == 143
    assert command.state.read_text() == f"signal {signal.SIGTERM:d}"
    assert all_end(started)


def test_ranks_save_where_nemo_is_killed(tmp_path: Path) -> None:
    command = Command(tmp_path, "trains", "saves")
    started = command.descendants()
    command.process.kill()
    assert all_end(started)
    assert command.state.read_text() == f"signal {signal.SIGTERM:d}"


def test_a_job_that_has_ended_leaves_no_watcher(tmp_path: Path) -> None:
    command = Command(tmp_path, "trains", "saves")
    started = command.descendants()
    (rank,) = next(p for p in started if p.children()).children()
    rank.terminate()
    assert command.end()[0] == 0
    assert all_end(started)


@pytest.mark.parametrize("number", [signal.SIGTERM, thorough(signal.SIGHUP)])
def test_without_a_job_a_signal_ends_nemo_as_ever(tmp_path: Path, number: int) -> None:
    script = "import sys, time; from nemo_upcycle.cli import interrupt; interrupt.listen()"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{script}; print('ready', flush=True); time.sleep(300)"],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline()
    process.send_signal(number)
    assert progress.exit_code(process) == -number
    process.stdout.close()


def test_a_second_time_they_are_ended_at_once(tmp_path: Path) -> None:
    command = Command(tmp_path, "trains", "takes long")
    command.ctrl_c()
    assert command.process.stdout is not None
    assert any("the ranks save" in line for line in command.process.stdout)
    command.ctrl_c()
    code, output = command.end()
    assert "Ctrl-C again: ended at once" in output
    assert code == 130


@pytest.mark.parametrize(
    ("number", "name", "expected"),
    [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)],
)
def test_before_training_they_are_ended_without_a_traceback(
    tmp_path: Path, number: int, name: str, expected: int
) -> None:
    command = Command(tmp_path, "imports")
    command.process.send_signal(number)
    code, output = command.end()
    assert f"{name}: ended, there was nothing to save" in output
    assert "Traceback" not in output
    assert code == expected


@pytest.fixture(autouse=True)
def _default_interrupt() -> None:
    """What a shell that starts tests in the background has set is inherited."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        pytest.skip("Ctrl-C is ignored here")

"""Ctrl-C under `nemo` reaches the ranks, with stand-ins for NeMo-Run, torchrun and ranks."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
import subprocess, sys
sys.exit(subprocess.Popen([sys.executable, *sys.argv[1:]], start_new_session=True).wait())
"""
NEMO = """
import subprocess, sys
from nemo_upcycle.cli import interrupt
interrupt.listen()
launched = subprocess.Popen([sys.executable, *sys.argv[1:]], start_new_session=True)
interrupt._launchers.append(launched)
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

    def end(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, output


def test_ranks_that_train_are_told(tmp_path: Path) -> None:
    command = Command(tmp_path, "trains", "saves")
    command.ctrl_c()
    code, output = command.end()
    assert "the ranks save at the end of their step and stop" in output
    assert "NeMo-Run ends" in output
    assert code == 130
    assert command.state.read_text() == f"signal {signal.SIGINT:d}"


def test_a_second_time_they_are_ended_at_once(tmp_path: Path) -> None:
    command = Command(tmp_path, "trains", "takes long")
    command.ctrl_c()
    assert command.process.stdout is not None
    assert any("the ranks save" in line for line in command.process.stdout)
    command.ctrl_c()
    code, output = command.end()
    assert "Ctrl-C again: ended at once" in output
    assert code == 130


def test_before_training_they_are_ended_without_a_traceback(tmp_path: Path) -> None:
    command = Command(tmp_path, "imports")
    command.ctrl_c()
    code, output = command.end()
    assert "Ctrl-C: ended, there was nothing to save" in output
    assert "Traceback" not in output
    assert code == 130


@pytest.fixture(autouse=True)
def _default_interrupt() -> None:
    """What a shell that starts tests in the background has set is inherited."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        pytest.skip("Ctrl-C is ignored here")

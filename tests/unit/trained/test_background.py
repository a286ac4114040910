"""Exports in the background of a run, with a tiny checkpoint and real processes."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from nemo_upcycle.trained.background import LINKED, Exports
from nemo_upcycle.trained.export import export
from tests import progress
from tests.moe_checkpoints import KINDS, moe_weights, save_moe

NAME = "step=7"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    kind = next(iter(KINDS.values()))
    return save_moe(tmp_path / "checkpoint", kind, moe_weights(kind))


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_checkpoint_that_is_removed_meanwhile_is_exported(
    checkpoint: Path, tmp_path: Path
) -> None:
    export(checkpoint, tmp_path / "expected")
    exports = Exports(tmp_path / "hf")
    exports.add(NAME, checkpoint)
    exports.add("step=9", checkpoint)
    shutil.rmtree(checkpoint)
    said = exports.poll() + exports.poll(wait=True)
    for name in (NAME, "step=9"):
        assert files(tmp_path / "hf" / name) == files(tmp_path / "expected")
        assert any(line.startswith(str(tmp_path / "hf" / name)) for line in said)
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [NAME, "step=9"]


def test_a_failure_is_one_warning_and_is_tried_again(checkpoint: Path, tmp_path: Path) -> None:
    exports = Exports(tmp_path / "hf")
    exports.add(NAME, checkpoint)
    damaged = next((tmp_path / "hf" / (NAME + LINKED)).rglob("metadata.json"))
    whole = damaged.read_bytes()
    damaged.unlink()
    (warning,) = exports.poll(wait=True)
    assert warning.startswith(f"warning: {tmp_path / 'hf' / NAME} could not be exported: ")
    assert str(tmp_path / "hf" / f"{NAME}.log") in warning
    assert not (tmp_path / "hf" / NAME).exists()

    damaged.write_bytes(whole)
    again = Exports(tmp_path / "hf")
    again.resume()
    again.poll(wait=True)
    assert [path.name for path in (tmp_path / "hf").iterdir()] == [NAME]


def test_an_export_of_an_earlier_start_is_replaced(checkpoint: Path, tmp_path: Path) -> None:
    outdated = tmp_path / "hf" / NAME
    outdated.mkdir(parents=True)
    (outdated / "outdated").touch()
    exports = Exports(tmp_path / "hf")
    exports.add(NAME, checkpoint)
    exports.poll(wait=True)
    assert not (outdated / "outdated").exists()
    assert (outdated / "config.json").exists()


RUN = """
import os, signal, sys
from pathlib import Path
from nemo_upcycle.trained.background import Exports
exports = Exports(Path(sys.argv[1]))
exports.resume()
exports.poll()
print(exports._running[1].pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_killed_run_leaves_no_process_and_the_next_start_exports(
    checkpoint: Path, tmp_path: Path
) -> None:
    exports = Exports(tmp_path / "hf")
    exports.add(NAME, checkpoint)
    never = next((tmp_path / "hf" / (NAME + LINKED)).rglob("metadata.json"))
    whole = never.read_bytes()
    never.unlink()
    os.mkfifo(never)  # nobody writes to it: an export that opens it never ends by itself

    run = subprocess.run(
        [sys.executable, "-c", RUN, tmp_path / "hf"], stdout=subprocess.PIPE, text=True, check=False
    )
    assert run.returncode == -signal.SIGKILL
    left = int(run.stdout)
    ended = progress.until(lambda: _has_ended(left), [left])
    if not ended:
        os.kill(left, signal.SIGKILL)
    assert ended

    never.unlink()
    never.write_bytes(whole)
    again = Exports(tmp_path / "hf")
    again.resume()
    again.poll(wait=True)
    assert [path.name for path in (tmp_path / "hf").iterdir()] == [NAME]


def _has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True

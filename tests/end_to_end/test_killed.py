"""The kernel kills a rank of the real command: the command says so."""

import os
import signal
from pathlib import Path

import psutil

from tests import progress
from tests.end_to_end import cli
from tests.workspace import make_workspace


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    make_workspace(tmp_path / "demo")
    factory = (
        "upcycle(dense_checkpoint='demo/dense_hf', max_steps=500, dir='runs', "
        "data_paths='demo/data/documentation')"
    )
    words = ("nemo", "llm", "pretrain", "--factory", factory, "--yes")
    log = tmp_path / "killed.log"
    process = cli.start_until(
        tmp_path,
        lambda: "iteration 2/" in log.read_text(errors="replace"),
        *words,
        "run.executor=cpu",
        "run.executor.ntasks_per_node=2",
    )
    launchers = [
        child
        for child in psutil.Process(process.pid).children()
        if any("torchrun" in word for word in child.cmdline())
    ]
    ranks = [rank for launcher in launchers for rank in launcher.children()]
    assert len(ranks) == 2
    os.kill(ranks[0].pid, signal.SIGKILL)
    progress.exit_code(process)
    said = log.read_text(errors="replace")
    assert "[nemo-upcycle] Error: rank 0 was killed by SIGKILL (exit code -9)." in said
    assert "2 rank(s) were expected to need " in said

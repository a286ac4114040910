"""A training that is killed and resumed, against the same training without interruption.

`python -m nemo_upcycle.check.restart '{…}'` is one rank of the training that is killed.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from nemo_upcycle.check.findings import KILLED_AND_RESUMED, Finding, Seen, agreed
from nemo_upcycle.check.models import Chunks
from nemo_upcycle.check.process_groups import (
    MINUTES,
    job,
    make_groups,
    patient,
    prepare_process,
    shared_port,
)
from nemo_upcycle.check.saved import load_weights, state_of
from nemo_upcycle.check.subject import STEP0_ROWS, Subject, build, fill_all, step, trainer
from nemo_upcycle.config import ParallelFolding

STEPS, SAVED, KILLED = 4, 2, 3
"""The last step, the step that is saved, and the step after which the ranks are killed."""

LEARNING_RATE = 1e-3

Losses = dict[int, float | None]
"""Loss by step; None but on the last pipeline stage."""


def train(
    subject: Subject, folding: ParallelFolding, directory: Path, killed: bool = False
) -> Losses:
    """Start a training, or resume it from its checkpoint; every rank of a job must call this.

    Args:
        subject: The model.
        folding: The mapping.
        directory: Directory of the checkpoint.
        killed: Whether the ranks kill themselves after the step `KILLED`.
    """
    ranks = patient()
    saved = (directory / ".metadata").exists()
    make_groups(folding)
    chunks = build(subject, folding)
    if not saved:
        fill_all(chunks, subject, ranks)
    models, optimizer = trainer(chunks, subject, LEARNING_RATE)
    if saved:
        state = dist_checkpointing.load(_state(chunks, optimizer, True), str(directory))
        load_weights(chunks, state)
        optimizer.load_state_dict(state["optimizer"])
    losses: Losses = {}
    rows = ranks.size * -(-STEP0_ROWS // ranks.size)
    for number in range(SAVED + 1 if saved else 1, STEPS + 1):
        losses[number] = step(models, optimizer, subject.ids(rows, seed=number))
        optimizer.step()
        if number == SAVED:
            directory.mkdir(parents=True, exist_ok=True)
            dist_checkpointing.save(_state(chunks, optimizer, False), str(directory))
        if killed and number == KILLED:
            torch.distributed.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
    return losses


def _state(chunks: Chunks, optimizer: Any, is_loading: bool) -> dict[str, Any]:
    state = state_of(chunks)
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
    }
    return {
        **state,
        "optimizer": optimizer.sharded_state_dict(state, is_loading, metadata=metadata),
    }


def check_restart(subject: Subject, folding: ParallelFolding, directory: Path) -> Finding:
    """Train, train with a kill, resume, and compare; every rank must call this, in no job."""
    with job():
        uninterrupted = train(subject, folding, directory / "uninterrupted")
        port = shared_port()
    code = _run(subject, folding, directory, port)

    def compare() -> Seen:
        if code != -signal.SIGKILL:
            log = _log(directory).read_text(errors="replace")[-1000:]
            return Seen(False, f"exit code {code}: {log}", "ranks that SIGKILL has ended")
        resumed = train(subject, folding, directory / "killed")
        return _compared(resumed, uninterrupted, subject.tolerance.resumed)

    with job():
        return agreed(KILLED_AND_RESUMED, str(folding), compare, patient())


def _run(subject: Subject, folding: ParallelFolding, directory: Path, port: int) -> int:
    """Run this rank of the training that is killed, in a process of its own."""
    arguments = {
        "dense": str(subject.dense),
        "dtype": str(subject.dtype).removeprefix("torch."),
        "folding": vars(folding),
        "directory": str(directory / "killed"),
    }
    with _log(directory).open("wb") as log:
        return subprocess.run(
            [sys.executable, "-m", "nemo_upcycle.check.restart", json.dumps(arguments)],
            # Its first rank has a store of its own, beside torchrun's.
            env={**os.environ, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"},
            stdout=log,
            stderr=log,
            timeout=3 * 60 * MINUTES,
        ).returncode


def _log(directory: Path) -> Path:
    return directory / f"killed-{os.environ.get('RANK', '0')}.log"


def _compared(resumed: Losses, uninterrupted: Losses, tolerance: float) -> Seen:
    expected = {number: uninterrupted[number] for number in range(SAVED + 1, STEPS + 1)}
    pairs = [
        (found, expected[number])
        for number, found in resumed.items()
        if number in expected and found is not None
    ]
    apart = max((abs(one - other) / other for one, other in pairs if other), default=0.0)
    return Seen(
        resumed.keys() == expected.keys() and apart <= tolerance,
        _said(resumed) + (f", {apart:.1e} apart" if apart else ""),
        f"{_said(expected)}, as without interruption",
        apart if pairs else -1.0,
    )


def _said(losses: Losses) -> str:
    shown = (
        f"step {number}: {'other stage' if loss is None else f'{loss:.8g}'}"
        for number, loss in losses.items()
    )
    return "losses " + ", ".join(shown)


def _main(arguments: dict[str, Any]) -> None:
    prepare_process()
    subject = Subject(Path(arguments["dense"]), getattr(torch, arguments["dtype"]))
    folding = ParallelFolding(**arguments["folding"])
    with job():
        train(subject, folding, Path(arguments["directory"]), killed=True)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))

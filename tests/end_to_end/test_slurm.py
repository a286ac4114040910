"""The tiny recipe on a real Slurm: trained, stopped, put back into the queue, and finished."""

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.training.curves import read_curve
from tests.end_to_end import cli
from tests.end_to_end import slurm as cluster
from tests.workspace import make_workspace

WHY_NOT = cluster.why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]
STEPS = 40
TIMEOUT_S = 400


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    directory = tmp_path_factory.mktemp("slurm")
    with cluster.slurm(directory / "cluster") as environment:
        yield {**cli.environment(), **environment, "NEMORUN_HOME": str(directory / "home"),
               "PATH": f"{cli.BIN}:{environment['PATH']}"}  # fmt: skip


def until(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


def state(environment: dict[str, str], job: str) -> str:
    text = cluster.run(environment, "scontrol", "show", "job", job)
    found = re.search(r"JobState=(\w+)", text)
    return found[1] if found else "GONE"


def restarts(environment: dict[str, str], job: str) -> int:
    found = re.search(r"Restarts=(\d+)", cluster.run(environment, "scontrol", "show", "job", job))
    return int(found[1]) if found else -1


def test_stopped_and_requeued_it_resumes_and_finishes(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    make_workspace(tmp_path / "demo")
    numbers = f"expert_model_parallel_size=2, max_steps={STEPS}, global_batch_size=8"
    words = [
        *("nemo", "llm", "pretrain", "--factory"),
        f"llama_tiny_e8t2(dir='{tmp_path}/demo', {numbers})",
        *("run.executor=slurm_bare", "run.executor.ntasks_per_node=2", "run.detach=true"),
        *("trainer.limit_val_batches=0", "--yes"),
    ]
    out = subprocess.run(
        cli.command(*words), cwd=tmp_path, env=slurm, text=True, capture_output=True, check=False
    )
    jobs = cluster.run(slurm, "squeue", "-h", "-o", "%i").split()
    assert len(jobs) == 1, out.stdout + out.stderr
    (job,) = jobs
    events = tmp_path / "demo" / "tb_logs" / "e8t2"

    def steps() -> int:
        try:
            return len(read_curve(events).steps)
        except UpcyclingError:  # nothing is logged yet
            return 0

    until(lambda: steps() >= 5, "no step was made")
    cluster.run(slurm, "scancel", "--signal=TERM", job)
    until(lambda: restarts(slurm, job) == 1, "it was not put back into the queue")
    assert steps() < STEPS
    # Slurm holds a job back for two minutes after it was requeued.
    cluster.run(slurm, "scontrol", "update", f"jobid={job}", "starttime=now")
    until(lambda: state(slurm, job) in ("COMPLETED", "FAILED", "GONE"), "it did not end")
    assert state(slurm, job) == "COMPLETED"
    logged = read_curve(events).steps
    # Lightning logs a step after the callbacks: the one that it was stopped in is not logged.
    assert len(set(range(STEPS)) - set(logged)) <= 1
    assert len(logged) == len(set(logged))
    (saved,) = (tmp_path / "demo" / "e8t2" / "checkpoints").glob(f"*-step={STEPS - 1}-*-last")
    assert saved.is_dir()

"""A training that is killed says so, and goes on where its last checkpoint was.

The other tests look at what one run has printed and saved until the kernel killed a rank.
"""

import os
import signal
from pathlib import Path

import psutil
import pytest

from nemo_upcycle.evaluation.curves import Curve, read_curve
from tests import progress
from tests.end_to_end import cli
from tests.workspace import make_workspace

STEPS, EVERY = 8, 3
TRAIN = (
    "nemo",
    "llm",
    "pretrain",
    "--factory",
    f"llama_tiny_e8t2(expert_model_parallel_size=2,max_steps={STEPS})",
    f"log.ckpt.every_n_train_steps={EVERY}",
    "trainer.limit_val_batches=0",
    "data.global_batch_size=8",
    "run.executor=cpu",
    "run.executor.ntasks_per_node=2",
    "--yes",
)
ANY_MODEL = (
    "nemo",
    "llm",
    "pretrain",
    "--factory",
    "upcycle(dense_checkpoint='demo/dense_hf', max_steps=500, dir='demo', name='e8t2', "
    "data_paths='demo/data/documentation', expert_model_parallel_size=2)",
    "log.ckpt.every_n_train_steps=2",
    "trainer.limit_val_batches=0",
    "run.executor=cpu",
    "run.executor.ntasks_per_node=2",
    "--yes",
)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Directory and output of a run of which the kernel killed a rank after a checkpoint."""
    directory = tmp_path_factory.mktemp("killed")
    make_workspace(directory / "demo")
    process = cli.start_until(directory, lambda: checkpoint(directory, step=1), *ANY_MODEL)
    launchers = [
        child
        for child in psutil.Process(process.pid).children()
        if any("torchrun" in word for word in child.cmdline())
    ]
    ranks = [rank for launcher in launchers for rank in launcher.children()]
    assert len(ranks) == 2
    os.kill(ranks[0].pid, signal.SIGKILL)
    progress.exit_code(process)
    return directory, (directory / "killed.log").read_text(errors="replace")


def checkpoint(directory: Path, step: int) -> Path | None:
    """Return the complete checkpoint of a step."""
    checkpoints = directory / "demo" / "e8t2" / "checkpoints"
    for found in checkpoints.glob(f"*-step={step}-*"):
        unfinished = found.with_name(found.name + "-unfinished")
        if found.is_dir() and not unfinished.exists():
            return found
    return None


def kill_once_saved(directory: Path, step: int) -> None:
    """Start the training; kill every process of it as soon as the step's checkpoint is whole."""
    process = cli.start_until(directory, lambda: checkpoint(directory, step), *TRAIN)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    psutil.wait_procs(family)


def losses(directory: Path) -> Curve:
    return read_curve(directory / "demo" / "tb_logs" / "e8t2")


def uninterrupted(directory: Path) -> Curve:
    """Run the training to its end; return its losses."""
    make_workspace(directory / "demo")
    cli.run(directory, *TRAIN)
    return losses(directory)


@pytest.mark.slow
def test_killed_run_resumes_and_equals_the_uninterrupted_one(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected = uninterrupted(tmp_path_factory.mktemp("uninterrupted"))
    make_workspace(tmp_path / "demo")
    kill_once_saved(tmp_path, step=EVERY - 1)
    assert checkpoint(tmp_path, STEPS - 1) is None
    output = cli.run(tmp_path, *TRAIN)

    assert "[upcycle] resuming from" in output
    assert "not upcycling again" in output
    assert "tensors mapped" not in output
    assert f"iteration {EVERY - 1}/" not in output
    assert checkpoint(tmp_path, STEPS - 1) is not None

    found = losses(tmp_path)
    assert found.steps == expected.steps == tuple(range(STEPS))
    differences = [abs(a - b) for a, b in zip(found.loss, expected.loss, strict=True)]
    assert max(differences) <= 1e-6


def test_a_killed_rank_is_named(killed: tuple[Path, str]) -> None:
    _, said = killed
    assert "[nemo-upcycle] Error: rank 0 was killed by SIGKILL (exit code -9)." in said
    assert "2 rank(s) were expected to need " in said


def test_fresh_start_reports(killed: tuple[Path, str]) -> None:
    _, said = killed
    assert "[upcycle] demo/dense_hf → E8T2 on 2 rank(s)" in said
    for line in ("tensors mapped    39 dense", "bytes read", "time", "peak memory"):
        assert line in said
    assert "step 0            exact" in said


def test_checkpoint_has_its_training_context(killed: tuple[Path, str]) -> None:
    """NeMo needs the context to read a checkpoint back, for `llm.export_ckpt` and others."""
    directory, said = killed
    assert "Failed to dump training context" not in said
    saved = checkpoint(directory, step=1)
    assert saved is not None
    script = (
        "import sys; from nemo.lightning import io; "
        "model = io.load_context(sys.argv[1], subpath='model'); "
        "trainer = io.load_context(sys.argv[1], subpath='trainer'); "
        "print('CONTEXT', type(model).__name__, model.config.num_moe_experts, "
        "type(trainer.strategy).__name__, trainer.strategy.expert_model_parallel_size)"
    )
    read = cli.run(directory, "python", "-c", script, str(saved / "context"))
    assert "CONTEXT UpcycledGPTModel 8 CpuMegatronStrategy 2" in read, read[-3000:]

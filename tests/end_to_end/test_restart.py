"""A training that is killed goes on where its last checkpoint was, and ends as if never killed."""

from pathlib import Path

import psutil
import pytest

from nemo_upcycle.evaluation.curves import Curve, read_curve
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


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("uninterrupted")
    make_workspace(directory / "demo")
    return directory, cli.run(directory, *TRAIN)


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


@pytest.mark.slow
def test_killed_run_resumes_and_equals_the_uninterrupted_one(
    uninterrupted: tuple[Path, str], tmp_path: Path
) -> None:
    make_workspace(tmp_path / "demo")
    kill_once_saved(tmp_path, step=EVERY - 1)
    assert checkpoint(tmp_path, STEPS - 1) is None
    output = cli.run(tmp_path, *TRAIN)

    assert "[upcycle] resuming from" in output
    assert "not upcycling again" in output
    assert "tensors mapped" not in output
    assert f"iteration {EVERY - 1}/" not in output
    assert checkpoint(tmp_path, STEPS - 1) is not None

    expected, found = losses(uninterrupted[0]), losses(tmp_path)
    assert found.steps == expected.steps == tuple(range(STEPS))
    differences = [abs(a - b) for a, b in zip(found.loss, expected.loss, strict=True)]
    assert max(differences) <= 1e-6


def test_fresh_start_reports(uninterrupted: tuple[Path, str]) -> None:
    output = uninterrupted[1]
    assert "[upcycle] demo/dense_hf → E8T2 on 2 rank(s)" in output
    for line in ("tensors mapped    39 dense", "bytes read", "time", "peak memory"):
        assert line in output
    assert "step 0            exact" in output


def test_checkpoint_has_its_training_context(uninterrupted: tuple[Path, str]) -> None:
    """NeMo needs the context to read a checkpoint back, for `llm.export_ckpt` and others."""
    directory, output = uninterrupted
    assert "Failed to dump training context" not in output
    saved = checkpoint(directory, STEPS - 1)
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

"""On a real Slurm: a training that is stopped and put back into the queue; a whole experiment."""

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nemo_upcycle_recipes
import psutil
import pytest

from nemo_upcycle.data.choices import write_choices
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.evaluation.curves import read_curve
from tests.end_to_end import cli
from tests.end_to_end import slurm as cluster
from tests.workspace import make_workspace

WHY_NOT = cluster.why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]
EXPERIMENT = Path(__file__).parents[2] / "examples" / "experiment.py"
STEPS = 40
TIMEOUT_S = 1800
"""For what hangs: what is only slow, as on a busy machine, takes a fraction of it."""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    directory = tmp_path_factory.mktemp("slurm")
    with cluster.slurm(directory / "cluster") as environment:
        yield {**cli.environment(), **environment, "NEMORUN_HOME": str(directory / "home"),
               "PATH": f"{cli.BIN}:{environment['PATH']}"}  # fmt: skip


@pytest.fixture(autouse=True)
def empty_queue(slurm: dict[str, str]) -> Iterator[None]:
    """Leave no job to the next test."""
    yield
    cluster.run(slurm, "scancel", "--user=root")
    until(lambda: not queue(slurm), "jobs were not canceled")


def until(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


def submit(environment: dict[str, str], directory: Path, *words: str) -> str:
    """Run a command that queues jobs; return what it printed."""
    result = subprocess.run(
        words, cwd=directory, env=environment, text=True, capture_output=True, check=False
    )
    return result.stdout + result.stderr


def queue(environment: dict[str, str]) -> list[str]:
    return cluster.ask(environment, "squeue", "-h", "-o", "%i").split()


def logs(environment: dict[str, str]) -> str:
    """Return the ends of what the jobs printed, for a test that fails."""
    files = sorted(Path(environment["NEMORUN_HOME"]).glob("**/*.out"))
    return "\n".join(
        f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files
    )


def train_job(environment: dict[str, str]) -> str:
    return cluster.ask(environment, "squeue", "-h", "-o", "%i", "-n", "nemo-upcycle.train").strip()


def state(environment: dict[str, str], job: str) -> str:
    text = cluster.ask(environment, "scontrol", "show", "job", job)
    found = re.search(r"JobState=(\w+)", text)
    return found[1] if found else "GONE"


def restarts(environment: dict[str, str], job: str) -> int:
    found = re.search(r"Restarts=(\d+)", cluster.ask(environment, "scontrol", "show", "job", job))
    return int(found[1]) if found else -1


def steps(events: Path) -> int:
    try:
        return len(read_curve(events).steps)
    except UpcyclingError:  # nothing is logged yet
        return 0


def ranks_of(environment: dict[str, str]) -> list[psutil.Process]:
    """Return the processes of the training that runs."""
    home = environment["NEMORUN_HOME"]
    return [
        process
        for process in psutil.process_iter(["cmdline", "environ"])
        if "nemo_run.core.runners.fdl_runner" in (process.info["cmdline"] or [])
        and "RANK" in (process.info["environ"] or {})
        and any(home in word for word in process.info["cmdline"])
    ]


def stop_once(
    environment: dict[str, str], job: str, events: Path, signal: str = "TERM", after: int = 5
) -> None:
    """Stop a training, see it put back into the queue, and let it go on.

    SIGTERM comes as from a scheduler; SIGKILL to one rank, as from a kernel without memory.
    """
    until(lambda: steps(events) >= after, "no step was made")
    if signal == "KILL":
        # The oldest: ranks fork processes that look like them.
        min(ranks_of(environment), key=psutil.Process.create_time).kill()
    else:
        cluster.run(environment, "scancel", f"--signal={signal}", job)
    until(lambda: restarts(environment, job) == 1, "it was not put back into the queue")
    until(lambda: not ranks_of(environment), "processes of the first start are left")
    # Slurm holds a job back for two minutes after it was requeued. It needs some seconds of them:
    # in the second in which the first start's credential was revoked a new one counts as revoked.
    time.sleep(3)
    cluster.run(environment, "scontrol", "update", f"jobid={job}", "starttime=now")


@pytest.mark.parametrize("signal", ["TERM", "KILL"])
def test_stopped_and_requeued_it_resumes_and_finishes(
    slurm: dict[str, str], tmp_path: Path, signal: str
) -> None:
    make_workspace(tmp_path / "demo")
    numbers = f"expert_model_parallel_size=2, max_steps={STEPS}, global_batch_size=8"
    words = [
        *("nemo", "llm", "pretrain", "--factory"),
        f"llama_tiny_e8t2(dir='{tmp_path}/demo', {numbers})",
        *("run.executor=slurm_bare", "run.executor.ntasks_per_node=2", "run.detach=true"),
        *("trainer.limit_val_batches=0", "log.ckpt.every_n_train_steps=5", "--yes"),
    ]
    out = submit(slurm, tmp_path, *cli.command(*words))
    jobs = queue(slurm)
    assert len(jobs) == 1, out
    (job,) = jobs
    events = tmp_path / "demo" / "tb_logs" / "e8t2"
    stop_once(slurm, job, events, signal, after=12)
    assert steps(events) < STEPS
    until(lambda: state(slurm, job) in ("COMPLETED", "FAILED", "GONE"), "it did not end")
    assert state(slurm, job) == "COMPLETED"
    logged = read_curve(events).steps
    # Lightning logs a step after the callbacks: the one that it was stopped in is not logged.
    assert len(set(range(STEPS)) - set(logged)) <= (signal == "TERM")
    logs = [path.read_text() for path in Path(slurm["NEMORUN_HOME"]).glob("**/log-*.out")]
    resumed = re.findall(r"resuming from \S+step=(\d+)", "\n".join(logs))
    assert resumed, "it began anew"
    assert int(resumed[0]) >= (12 if signal == "TERM" else 4)
    (saved,) = (tmp_path / "demo" / "e8t2" / "checkpoints").glob(f"*-step={STEPS - 1}-*-last")
    assert saved.is_dir()


def test_the_experiment_goes_from_a_dense_checkpoint_to_scores(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    make_workspace(tmp_path / "demo")
    corpora = [
        tmp_path / "demo" / "data" / f"{name}.jsonl" for name in ("documentation", "sources")
    ]
    write_choices(corpora, tmp_path / "demo" / "task", "next_line", items=100, held_out=1.0)
    task = f"--tasks next_line --include-path {tmp_path}/demo/task --limit 5 --ep 2"
    words = [
        *(str(cli.BIN / "python"), str(EXPERIMENT), f"dir={tmp_path}/demo", f"max_steps={STEPS}"),
        *("expert_model_parallel_size=2", "--executor", "slurm_bare"),
        *("executor.ntasks_per_node=2", "--detach", "--evaluation", task),
    ]
    out = submit(slurm, tmp_path, *words)
    jobs = queue(slurm)
    assert len(jobs) == 4, out
    stop_once(slurm, train_job(slurm), tmp_path / "demo" / "tb_logs" / "e8t2")
    until(lambda: not queue(slurm), "the jobs did not end")
    scores = tmp_path / "demo" / f"e8t2_{STEPS}_steps_scores" / "scores.md"
    assert scores.is_file(), logs(slurm)
    table = scores.read_text()
    assert re.search(r"\| next_line \| 0 \| acc \| [\d.]+ ± [\d.]+ \| [\d.]+ ± [\d.]+ \|", table)


def test_what_waits_for_a_job_that_failed_does_not_stay_in_the_queue(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    make_workspace(tmp_path / "demo")
    (tmp_path / "demo" / "dense_hf" / "model.safetensors").write_bytes(b"damaged")
    words = [str(cli.BIN / "python"), str(EXPERIMENT), f"dir={tmp_path}/demo", "max_steps=4"]
    out = submit(slurm, tmp_path, *words, "--executor", "slurm_bare", "--detach")
    assert len(queue(slurm)) == 4, out
    until(lambda: not queue(slurm), "jobs wait for one that failed")
    assert not list((tmp_path / "demo").glob("e8t2*"))


def test_slurm_accepts_the_scripts_of_the_full_recipe(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    config = Path(nemo_upcycle_recipes.__file__).parent / "configs" / "llama3_8b.json"
    (tmp_path / "config.json").write_text(config.read_text())
    words = [
        *(str(cli.BIN / "python"), str(EXPERIMENT), "--recipe", "llama3_8b_e8t2", "--dryrun"),
        *(f"dense_checkpoint={tmp_path}", f"dir={tmp_path}/runs", "--executor", "slurm"),
        *("executor.container_image=moe.sqsh", "executor.container_mounts=/shared:/shared"),
        *("executor.nodes=64", "executor.partition=gpu"),
    ]
    out = submit(slurm, tmp_path, *words)
    (written,) = re.findall(r"scripts are in (\S+)", out)
    scripts = {path.name.split("_")[0]: path for path in Path(written).glob("*_sbatch.sh")}
    assert scripts.keys() == {"import", "train", "export", "evaluate"}, out
    for name, script in scripts.items():
        accepted, said = taken(slurm, script)
        assert accepted, said
        assert f"on nodes gpu{'[01-64]' if name == 'train' else '01'} in partition gpu" in said
    text = scripts["train"].read_text()
    assert "--container-image moe.sqsh --container-mounts /shared:/shared," in text
    assert "#SBATCH --signal=TERM@300" in text
    more = tmp_path / "more.sh"
    more.write_text(text.replace("--nodes=64", "--nodes=65"))
    assert not taken(slurm, more)[0]


def taken(environment: dict[str, str], script: Path) -> tuple[bool, str]:
    """Ask Slurm whether it would take a script; return that, and what it says."""
    asked = subprocess.run(
        ["sbatch", "--test-only", str(script)],
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )
    return asked.returncode == 0, asked.stderr

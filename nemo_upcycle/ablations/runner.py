"""Run the missing trainings and report on all results."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_upcycle.ablations.picture import draw
from nemo_upcycle.ablations.report import Report, markdown, report_of, to_json
from nemo_upcycle.ablations.results import Workspace, jobs_of
from nemo_upcycle.ablations.studies import Study, arms_of
from nemo_upcycle.ablations.workers import train_all
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.pictures import require_matplotlib


def ablate(
    studies: list[Study],
    seeds: int,
    steps: int,
    directory: Path,
    out: Path,
    workers: int,
    show: Callable[..., None],
) -> Report:
    """Train all arms of some studies and write `ablations.md`, `.json` and `.png`.

    A finished training is repeated only if something that determines the result has changed.

    Args:
        studies: The studies.
        seeds: Number of trainings per arm.
        steps: Number of steps of the baseline.
        directory: The demo's directory.
        out: Output directory, created if missing.
        workers: Number of parallel trainings.
        show: Called with the FLOPs done, the FLOPs in total, and the training's name.

    Raises:
        UpcyclingError: The demo's data or dense checkpoint are missing, a training fails, another
            command writes to the directory, or matplotlib is not installed.
    """
    require_matplotlib()
    workspace = Workspace(directory.absolute())
    jobs = jobs_of(arms_of(studies), seeds, steps, workspace, out / "results")
    with _alone_in(out):
        todo = [job for job in jobs if job.result() is None]
        # In FLOPs, so that the remaining time can be estimated.
        sizes = {
            job.name: job.steps * job.arm.flops_per_step(workspace.architecture) for job in jobs
        }
        total, done = sum(sizes[job.name] for job in todo), 0.0
        if todo:
            for job in train_all(todo, workers, out / "logs"):
                done += sizes[job.name]
                show(done, total, job.name)
            shutil.rmtree(out / "logs")
        report = report_of(studies, jobs, steps)
        _write(report, to_json(report, jobs), out)
    return report


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Lock a directory against other commands; the lock ends with this process."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UpcyclingError(
                f"Another command is writing to {out}. Wait for it, or give another --out."
            ) from None
        yield


def _write(report: Report, numbers: str, out: Path) -> None:
    """Write all three files, each atomically."""
    with tempfile.TemporaryDirectory(dir=out, prefix=".ablations-") as temporary:
        new = Path(temporary)
        (new / "ablations.md").write_text(markdown(report, "ablations.png"), encoding="utf-8")
        (new / "ablations.json").write_text(numbers, encoding="utf-8")
        draw(report, new / "ablations.png")
        for file in sorted(new.iterdir()):
            os.replace(file, out / file.name)

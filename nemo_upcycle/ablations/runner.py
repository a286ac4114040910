"""Do what has not been done, and say what all of it shows."""

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

    A training that is done is not done again, unless something of it is another now.

    Args:
        studies: What is asked.
        seeds: Trainings of each arm.
        steps: Of the baseline.
        directory: The demo's.
        out: Directory to write to; made when missing.
        workers: Trainings at a time.
        show: Told what is done, what there is in all, and a word about it.

    Raises:
        UpcyclingError: The demo's data or dense checkpoint are not there, a training fails,
            another command writes to the directory, or matplotlib is not installed.
    """
    require_matplotlib()
    workspace = Workspace(directory.absolute())
    jobs = jobs_of(arms_of(studies), seeds, steps, workspace, out / "results")
    with _alone_in(out):
        todo = [job for job in jobs if job.result() is None]
        # In FLOPs, so that the time that is left can be told.
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
    """Keep other commands out of a directory; the lock ends with this process."""
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
    """Write all three files, each whole or not at all."""
    with tempfile.TemporaryDirectory(dir=out, prefix=".ablations-") as temporary:
        new = Path(temporary)
        (new / "ablations.md").write_text(markdown(report, "ablations.png"), encoding="utf-8")
        (new / "ablations.json").write_text(numbers, encoding="utf-8")
        draw(report, new / "ablations.png")
        for file in sorted(new.iterdir()):
            os.replace(file, out / file.name)

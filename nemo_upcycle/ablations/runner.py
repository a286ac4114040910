"""Run the missing trainings and report on all results."""

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_upcycle.ablations.arms import BASELINE, Arm, Study
from nemo_upcycle.ablations.bases import TINY, Base
from nemo_upcycle.ablations.budget import (
    TRIAL_STEPS,
    Cost,
    Plan,
    keep_plan,
    kept_plan,
    plan,
    same_model,
)
from nemo_upcycle.ablations.inputs import make_inputs
from nemo_upcycle.ablations.picture import draw
from nemo_upcycle.ablations.report import Report, report_of, to_json
from nemo_upcycle.ablations.results import Job, Workspace, jobs_of
from nemo_upcycle.ablations.studies import arms_of
from nemo_upcycle.ablations.tables import markdown
from nemo_upcycle.ablations.workers import train_missing
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.pictures import require_matplotlib


@dataclass(frozen=True)
class Question:
    """What is asked for.

    Attributes:
        studies: The studies.
        seeds: Number of trainings per arm.
        steps: Number of steps of the baseline; None for the recipe's, or what fits `minutes`.
        minutes: Time of this command; None for no limit.
        least_steps: Steps below which fewer trainings are better than shorter ones.
        base: The model.
    """

    studies: Sequence[Study]
    seeds: int
    steps: int | None = None
    minutes: float | None = None
    least_steps: int = 100
    base: Base = TINY

    @property
    def arms(self) -> list[Arm]:
        """The distinct arms."""
        return arms_of(list(self.studies), self.base)


def ablate(
    question: Question, workspace: Workspace, out: Path, workers: int, show: Callable[..., None]
) -> Report:
    """Train all arms of some studies and write `ablations.md`, `.json` and `.png`.

    A finished training is repeated only if something that determines the result has changed.

    Args:
        question: What is asked for.
        workspace: The data and the dense checkpoint.
        out: Output directory, created if missing.
        workers: Number of parallel trainings.
        show: Called with the FLOPs done, the FLOPs in total, and the training's name.

    Raises:
        UpcyclingError: A training fails, another command writes to the directory, the minutes are
            too few, or matplotlib is not installed.
    """
    require_matplotlib()
    deadline = None if question.minutes is None else time.time() + 60 * question.minutes
    with _alone_in(out):
        chosen = _plan(question, workspace, out, workers, deadline, show)
        arms = [arm for arm in question.arms if arm.name in chosen.arms]
        inputs = make_inputs(arms, workspace, out, workers, show)
        jobs = jobs_of(arms, chosen.seeds, chosen.steps, workspace, out / "results")
        jobs = [inputs.given_to(job) for job in jobs]
        costs = _costs(arms, workspace, out) if deadline is not None else {}

        def expected(job: Job) -> float:
            cost = costs.get(job.arm.name)
            return 0.0 if cost is None else cost.other + job.steps * cost.per_step

        train_missing(jobs, workers, out / "logs", show, deadline, expected)
        done = [job for job in jobs if job.result() is not None]
        late = [job.name for job in jobs if job.result() is None]
        if not {job.arm.name for job in done} >= {BASELINE}:
            raise UpcyclingError(
                f"No training of the baseline has ended within {question.minutes:g} minutes; the "
                "same command goes on. Give more --minutes."
            )
        left_out = [*chosen.left_out]
        if late:
            left_out.append(f"{', '.join(late)}, for want of time (the same command goes on)")
        paired = {job.seed for job in done if job.arm.name == BASELINE}
        kept = {job.arm.name for job in done if job.seed in paired}
        studies = [replace(study.of(kept), note=study.note) for study in question.studies]
        report = report_of(studies, done, chosen.steps, left_out)
        _write(report, to_json(report, done), out)
    return report


# --- What fits into the time ---------------------------------------------------------------------


def _plan(
    question: Question,
    workspace: Workspace,
    out: Path,
    workers: int,
    deadline: float | None,
    show: Callable[..., None],
) -> Plan:
    """Return what is trained; with a limit of minutes an earlier call's choice counts."""
    arms = question.arms
    names = tuple(arm.name for arm in arms)
    if question.steps is not None or deadline is None:
        steps = question.steps or arms[0].recipe.schedule.max_steps
        return Plan(names, question.seeds, steps)
    asked = {
        "arms": names,
        "seeds": question.seeds,
        "least_steps": question.least_steps,
        "made_of": [job.made_of for job in _trials(arms, workspace, out)],
    }
    if (kept := kept_plan(out / "plan.json", asked)) is not None:
        return kept
    inputs = make_inputs(arms, workspace, out, workers, show)
    trials = [inputs.given_to(trial) for trial in _trials(arms, workspace, out)]
    train_missing(trials, workers, out / "logs", show)
    at_once = workers if question.base.accelerator == "cpu" else 1
    left = at_once * (deadline - time.time())
    arch = workspace.architecture
    costs = _costs(arms, workspace, out)
    chosen = plan(arms, question.seeds, left, costs, arch, question.least_steps)
    keep_plan(out / "plan.json", asked, chosen)
    return chosen


def _trials(arms: Sequence[Arm], workspace: Workspace, out: Path) -> list[Job]:
    """Return a short training per kind of model, for the time of a step."""
    arch = workspace.architecture
    kinds = {same_model(arm, arch): arm for arm in reversed(arms)}
    first = [arm for arm in arms if arm in kinds.values()]
    results = out / "results" / "trials"
    samples = TRIAL_STEPS * max(arm.recipe.schedule.global_batch_size for arm in arms)
    return [Job(arm, 1, TRIAL_STEPS, samples, workspace, results) for arm in first]


def _costs(arms: Sequence[Arm], workspace: Workspace, out: Path) -> dict[str, Cost]:
    """Return the measured costs of arms: of a trial of the same kind of model."""
    arch = workspace.architecture
    found: dict[str, Cost] = {}
    for trial in _trials(arms, workspace, out):
        result = trial.result()
        if result is not None and result.step_seconds is not None:
            cost = Cost(result.step_seconds, result.other_seconds or 0.0)
            found[same_model(trial.arm, arch)] = cost
    kinds = {arm.name: same_model(arm, arch) for arm in arms}
    return {name: found[kind] for name, kind in kinds.items() if kind in found}


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

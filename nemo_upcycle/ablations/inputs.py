"""What arms need beside the data and the dense checkpoint: statistics, and branches to mix.

All is made once, whatever the number of seeds. Branches are the dense model, trained on with one
corpus each (Branch-Train-MiX, arXiv 2403.07816).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_upcycle.ablations.arms import STATISTICS, Arm
from nemo_upcycle.ablations.prompts import PROMPTS
from nemo_upcycle.ablations.results import CALIBRATION, Job, Workspace
from nemo_upcycle.ablations.studies import most_sequences
from nemo_upcycle.ablations.workers import train_missing
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.files import write_whole

BRANCH_STEPS = 100
"""Steps of the dense model on each corpus."""


@dataclass(frozen=True)
class Inputs:
    """What arms need.

    Attributes:
        statistics: Of the dense model over the text.
        branches: Trainings of the dense model, one per corpus.
        statistics_of_branches: Of the branches, each over its own corpus.
    """

    statistics: Path | None = None
    branches: tuple[Job, ...] = ()
    statistics_of_branches: Path | None = None

    def given_to(self, job: Job) -> Job:
        """Return a training with what its arm needs."""
        if job.arm.mixed:
            job = replace(job, branches=self.branches)
        if job.arm.needs_statistics:
            file = self.statistics_of_branches if job.arm.mixed else self.statistics
            job = replace(job, statistics=file)
        return job


def make_inputs(
    arms: Sequence[Arm], workspace: Workspace, out: Path, workers: int, show: Callable[..., None]
) -> Inputs:
    """Make what arms need, as far as it is not there.

    Args:
        arms: The arms.
        workspace: The data and the dense checkpoint.
        out: The command's output directory.
        workers: Number of processes.
        show: Called with what is done, what there is in total, and a name.

    Raises:
        UpcyclingError: A training fails, the checkpoint cannot be computed, or there are other
            statistics.
    """
    out = out.absolute()
    found = Inputs()
    if any(arm.needs_statistics and not arm.mixed for arm in arms):
        # NeMo's processes read the file, and stand in other directories.
        found = replace(found, statistics=out / "statistics")
        _calibrate_dense(arms[0], workspace, out, workers, show)
    if mixed := [arm for arm in arms if arm.mixed]:
        branches = branches_of(mixed[0], workspace, out / "branches")
        train_missing(branches, workers, out / "logs", show)
        found = replace(found, branches=tuple(branches))
        if any(arm.needs_statistics for arm in mixed):
            file = out / "branches" / "statistics"
            found = replace(found, statistics_of_branches=file)
            _calibrate_branches(mixed[0], branches, workspace, file, workers, show)
    return found


def branches_of(arm: Arm, workspace: Workspace, directory: Path) -> list[Job]:
    """Return trainings of the dense model, one per corpus.

    Args:
        arm: The arm that mixes the branches.
        workspace: The data and the dense checkpoint.
        directory: Directory of the branches.
    """
    samples = most_sequences(BRANCH_STEPS, workspace.architecture, arm.base)
    return [
        Job(
            Arm(path.file("").name, "", start="dense", base=arm.base),
            seed=1,
            steps=BRANCH_STEPS,
            samples=samples,
            workspace=replace(workspace, paths=(replace(path, weight=1.0),)),
            results=directory,
            weights=directory / path.file("").name,
        )
        for path in workspace.paths
    ]


def with_statistics(upcycling: UpcyclingConfig, file: Path) -> UpcyclingConfig:
    """Return the config with the path of the statistics instead of the word that stands for it."""
    return replace(
        upcycling,
        initializer=upcycling.initializer.replace(STATISTICS, str(file)),
        router_initializer=upcycling.router_initializer.replace(STATISTICS, str(file)),
    )


def _calibrate_dense(
    arm: Arm, workspace: Workspace, out: Path, workers: int, show: Callable[..., None]
) -> None:
    prompts = out / "prompts.jsonl"
    write_whole(prompts, "".join(json.dumps(each) + "\n" for each in PROMPTS))
    _calibrate(
        str(workspace.dense),
        *(arm, workspace, out / "statistics", workers, show),
        cluster_rank=workspace.architecture.hidden_size // 2,
        prompts=prompts,
    )


def _calibrate_branches(
    arm: Arm,
    branches: Sequence[Job],
    workspace: Workspace,
    file: Path,
    workers: int,
    show: Callable[..., None],
) -> None:
    dense = "; ".join(str(branch.weights) for branch in branches)
    _calibrate(dense, arm, workspace, file, workers, show, second_moment="full")


def _calibrate(
    dense: str,
    arm: Arm,
    workspace: Workspace,
    file: Path,
    workers: int,
    show: Callable[..., None],
    **options: Any,
) -> None:
    """Calibrate over the first documents of each corpus, in sequences of the training's length."""
    from nemo_upcycle.calibration.calibrate import Calibration, calibrate  # takes seconds to import

    texts = tuple(str(path.file(".bin")) for path in workspace.paths)
    length = arm.recipe.schedule.seq_length
    calibration = Calibration(dense, texts, file, sequence_length=length, **CALIBRATION, **options)
    calibrate(calibration, workers, show)

"""The results of trainings: rows per study, and a verdict per claim."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from nemo_upcycle.ablations.arms import Arm, Claim, Study, dense_run_flops
from nemo_upcycle.ablations.bases import Base
from nemo_upcycle.ablations.results import Job, Result
from nemo_upcycle.ablations.statistics import Estimate, verdict
from nemo_upcycle.ablations.studies import arms_with

Results = dict[str, dict[int, Result]]
"""Results by arm and seed."""


@dataclass(frozen=True)
class Row:
    """The results of an arm in a study.

    Attributes:
        arm: The arm.
        start: Loss before the first step, in nats per token.
        end: Loss after the last step, in nats per token.
        differences: Difference of `end` from the study's first arm, one value per seed.
        capped: Loss after the last step with the training's capacity factor, in nats per token.
        dropped: Share of the assignments that the capacity factor drops.
        accuracy: Accuracy in `next_line` after the last step; None if it was not asked.
        tokens: Number of training tokens.
        flops: Number of training FLOPs.
        over_time: As in `Result`, means over seeds.
    """

    arm: Arm
    start: Estimate
    end: Estimate
    differences: tuple[float, ...]
    capped: Estimate
    dropped: Estimate
    accuracy: Estimate | None
    tokens: int
    flops: float
    over_time: Mapping[str, tuple[Estimate, ...]]

    @property
    def difference(self) -> Estimate:
        """Mean of the differences."""
        return Estimate.of(self.differences)


@dataclass(frozen=True)
class Finding:
    """A claim and the measured difference, which is positive if the claim holds."""

    claim: Claim
    difference: Estimate

    @property
    def verdict(self) -> str:
        """The verdict on the claim."""
        return verdict(self.difference)

    def __str__(self) -> str:
        low, high = self.difference.interval
        between = "" if self.difference.error is None else f", {low:+.4f} to {high:+.4f}"
        return f"{self.verdict} ({self.difference.signed}{between})"


@dataclass(frozen=True)
class StudyReport:
    """The results of a study."""

    study: Study
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Report:
    """The results of all trainings.

    Attributes:
        studies: Results per study.
        steps: Number of steps of the baseline.
        seeds: Number of seeds per arm.
        tokens_per_step: Tokens per step, equal for all arms.
        held_out_tokens: Number of tokens on which losses are measured.
        dense_flops: FLOPs of the dense model's own training; None if unknown.
        seconds: Processor seconds of all trainings.
        base: The model.
        left_out: What was asked for and is missing, in words.
    """

    studies: tuple[StudyReport, ...]
    steps: int
    seeds: int
    tokens_per_step: int
    held_out_tokens: int
    dense_flops: float | None
    seconds: float
    base: Base
    left_out: tuple[str, ...] = ()


def report_of(
    studies: Sequence[Study], jobs: Sequence[Job], steps: int, left_out: Sequence[str] = ()
) -> Report:
    """Make the report from the results.

    Args:
        studies: The studies.
        jobs: Finished trainings of all arms of the studies.
        steps: Number of steps of the baseline.
        left_out: What was asked for and is missing, in words.
    """
    results: Results = {}
    for job in jobs:
        result = job.result()
        assert result is not None
        results.setdefault(job.arm.name, {})[job.seed] = result
    of_arm = {job.arm.name: job for job in jobs}
    first = jobs[0]
    schedule, base = first.arm.recipe.schedule, first.arm.base
    everything = [result for by_seed in results.values() for result in by_seed.values()]
    return Report(
        tuple(_study(study, of_arm, results) for study in studies),
        steps,
        len(results[first.arm.name]),
        schedule.tokens_per_step,
        everything[0].held_out_tokens,
        dense_run_flops(first.workspace.architecture, base) if base.trained_by_dense else None,
        sum(result.seconds for result in everything),
        base,
        tuple(left_out),
    )


def _study(study: Study, jobs: dict[str, Job], results: Results) -> StudyReport:
    return StudyReport(
        study,
        tuple(
            _row(jobs[name], results[name], results[study.arms[0]])
            for name in study.arms
            if results[name].keys() & results[study.arms[0]]
        ),
        tuple(
            _finding(claim, results)
            for claim in study.claims
            if results[claim.lower].keys() & results[claim.higher]
        ),
    )


def _row(job: Job, of_arm: dict[int, Result], baseline: dict[int, Result]) -> Row:
    def estimate(field: str) -> Estimate:
        return Estimate.of([getattr(result, field) for result in of_arm.values()])

    per_step = job.arm.flops_per_step(job.workspace.architecture)
    return Row(
        job.arm,
        estimate("start"),
        estimate("end"),
        tuple(of_arm[seed].end - baseline[seed].end for seed in sorted(of_arm.keys() & baseline)),
        estimate("capped_end"),
        estimate("dropped"),
        None if job.workspace.items is None else estimate("end_accuracy"),
        job.steps * job.arm.recipe.schedule.tokens_per_step,
        job.steps * per_step,
        _over_time(list(of_arm.values())),
    )


def _over_time(results: Sequence[Result]) -> dict[str, tuple[Estimate, ...]]:
    """Return means over seeds of what was measured over time."""
    return {
        name: tuple(
            Estimate.of(values)
            for values in zip(*(result.over_time[name] for result in results), strict=True)
        )
        for name in results[0].over_time
    }


def _finding(claim: Claim, results: Results) -> Finding:
    lower, higher = results[claim.lower], results[claim.higher]
    seeds = sorted(lower.keys() & higher.keys())
    return Finding(
        claim,
        Estimate.of(
            [
                higher[seed].value(claim.of, claim.at) - lower[seed].value(claim.of, claim.at)
                for seed in seeds
            ]
        ),
    )


def to_json(report: Report, jobs: Sequence[Job]) -> str:
    """Return all numbers as JSON: each seed's results and the report."""
    trainings = [
        {"arm": job.arm.name, "seed": job.seed, "steps": job.steps, "key": job.key}
        | vars(job.result())
        for job in jobs
    ]
    arms = {
        name: {
            "label": arm.label,
            "start": arm.start,
            "numbers": dict(arm.numbers),
            "schedule": dict(arm.schedule),
            "router_warmup_steps": arm.router_warmup_steps,
            "mixed": arm.mixed,
            "budget": arm.budget,
        }
        for name, arm in arms_with(report.base).items()
    }
    studies = [
        {
            "name": one.study.name,
            "arms": {
                row.arm.name: {
                    name: asdict(getattr(row, name)) for name in ("start", "end", "difference")
                }
                | {"tokens": row.tokens, "flops": row.flops}
                | {
                    "over_time": {
                        name: [asdict(each) for each in values]
                        for name, values in row.over_time.items()
                    }
                }
                for row in one.rows
            },
            "claims": [
                asdict(finding.claim)
                | {"difference": asdict(finding.difference), "verdict": finding.verdict}
                for finding in one.findings
            ],
        }
        for one in report.studies
    ]
    about = {
        name: getattr(report, name)
        for name in ("steps", "seeds", "tokens_per_step", "held_out_tokens", "dense_flops")
    }
    if report.left_out:
        about["left_out"] = report.left_out
    document = about | {"arms": arms, "studies": studies, "trainings": trainings}
    return json.dumps(document, indent=1) + "\n"

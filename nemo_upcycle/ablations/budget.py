"""How much fits into a number of minutes: the steps of all trainings, or fewer trainings.

Where the time is short, things are left out in this order: steps down to a least number, then seeds
down to 2, then arms from the end of the study down to 2, then the second seed.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.ablations.arms import Arm
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture
from nemo_upcycle.families.model import upcycled_model
from nemo_upcycle.files import write_whole

RESERVE = 0.05
"""Share of the minutes that is not planned: steps vary, and files are written."""

TRIAL_STEPS = 12
"""Steps of a training that only measures the time of a step."""


@dataclass(frozen=True)
class Cost:
    """Measured seconds of a training: per step, and for everything else."""

    per_step: float
    other: float


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Attributes:
        arms: Names of the arms.
        seeds: Trainings per arm.
        steps: Steps of the baseline.
        left_out: What was asked for and is not trained, in words.
    """

    arms: tuple[str, ...]
    seeds: int
    steps: int
    left_out: tuple[str, ...] = ()


def same_model(arm: Arm, arch: Architecture) -> str:
    """Return a text that is equal for arms whose steps take equally long."""
    recipe = arm.recipe
    return f"{upcycled_model(arch, recipe.upcycling)} {recipe.schedule.global_batch_size}"


def plan(
    arms: Sequence[Arm],
    seeds: int,
    seconds: float,
    costs: Mapping[str, Cost],
    arch: Architecture,
    least: int,
) -> Plan:
    """Return the trainings that fit into the time.

    Args:
        arms: The arms, the baseline first.
        seeds: Trainings per arm that are asked for.
        seconds: The time.
        costs: Measured costs by arm.
        arch: Architecture of the dense model.
        least: Steps of the baseline below which fewer trainings are better.

    Raises:
        UpcyclingError: Not even one step of two arms fits.
    """
    seconds *= 1 - RESERVE
    most = arms[0].recipe.schedule.max_steps
    for count, times in _reductions(len(arms), seeds):
        kept = arms[:count]
        steps = _steps_that_fit(kept, times, seconds, costs, arch, most)
        last = (count, times) == _fewest(len(arms))
        if steps >= min(least, most) or (last and steps > 0):
            names = tuple(arm.name for arm in kept)
            return Plan(names, times, steps, _left_out(arms, seeds, count, times, steps, most))
    start = sum(costs[arm.name].other for arm in arms[:2])
    raise UpcyclingError(
        f"{seconds / 60 / (1 - RESERVE):.3g} minutes are too few: starting and measuring two "
        f"trainings alone takes {start:.0f} s. Give more --minutes."
    )


def _reductions(arms: int, seeds: int) -> Iterator[tuple[int, int]]:
    """Yield numbers of arms and seeds, in the order in which they are tried."""
    fewest_arms, _ = _fewest(arms)
    for times in range(seeds, min(seeds, 2) - 1, -1):
        yield arms, times
    for count in range(arms - 1, fewest_arms - 1, -1):
        yield count, min(seeds, 2)
    if (fewest_arms, 1) != (arms, seeds):
        yield fewest_arms, 1


def _fewest(arms: int) -> tuple[int, int]:
    return min(arms, 2), 1


def _steps_that_fit(
    arms: Sequence[Arm],
    seeds: int,
    seconds: float,
    costs: Mapping[str, Cost],
    arch: Architecture,
    most: int,
) -> int:
    """Return the largest number of steps of the baseline, at most `most`; 0 if none fits."""

    def fits(steps: int) -> bool:
        needed = sum(
            costs[arm.name].other + arm.steps(steps, arch) * costs[arm.name].per_step
            for arm in arms
        )
        return seeds * needed <= seconds

    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _left_out(
    arms: Sequence[Arm], seeds: int, count: int, times: int, steps: int, most: int
) -> tuple[str, ...]:
    left = []
    if steps < most:
        left.append(f"steps beyond {steps} of the recipe's {most:,}")
    if times < seeds:
        left.append(f"seeds beyond {times} of {seeds} per arm")
    if count < len(arms):
        left.append(f"the arms {', '.join(arm.label for arm in arms[count:])}")
    return tuple(left)


def kept_plan(path: Path, asked: dict[str, Any]) -> Plan | None:
    """Return the plan that an earlier call chose for the same question; None without one.

    Args:
        path: The plan's file.
        asked: Everything that determines the plan but the minutes and the measured times.
    """
    try:
        kept = json.loads(path.read_text())
        if kept["asked"] != json.loads(json.dumps(asked)):
            return None
        return Plan(**{name: _tuple(value) for name, value in kept["plan"].items()})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def keep_plan(path: Path, asked: dict[str, Any], chosen: Plan) -> None:
    """Write the plan, which later calls follow."""
    write_whole(path, json.dumps({"asked": asked, "plan": asdict(chosen)}, indent=1) + "\n")

"""What comparisons are made of: arms, claims and studies.

The baseline is E8T2 with copies, a Mixtral-type router, no dropped tokens, and the learning rate
reset to the dense run's peak. An arm is a training with stated differences from the baseline. A
claim states which of two arms has less of something, usually of the loss at the end.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_upcycle_recipes.arguments import with_arguments
from nemo_upcycle_recipes.recipe import Recipe

from nemo_upcycle.ablations.bases import TINY, Base
from nemo_upcycle.families import Architecture
from nemo_upcycle.families.model import upcycled_model
from nemo_upcycle.planner.flops import flops

BASELINE = "e8t2"
BUDGETS = ("tokens", "flops", "all_flops")
STARTS = ("upcycled", "dense", "scratch")

STATISTICS = "STATISTICS"
"""Stands in an arm's initializers for the file of statistics; see `ablations.inputs`."""


@dataclass(frozen=True)
class Arm:
    """A training.

    Attributes:
        name: Name in claims and files.
        label: Name in tables and pictures.
        start: `upcycled`, `dense` (the dense model trained further), or `scratch` (the same MoE
            from random weights).
        numbers: Arguments of the recipe's factory.
        schedule: Fields of `Schedule` that differ from the recipe's.
        router_warmup_steps: First steps in which only the routers are trained.
        mixed: Whether the experts are those of several dense models, each trained on one corpus
            (Branch-Train-MiX); see `ablations.inputs`.
        budget: As many steps as the baseline (`tokens`), as many FLOPs as the baseline (`flops`),
            or as many FLOPs as the baseline and the preceding dense run together (`all_flops`).
        base: The model.
    """

    name: str
    label: str
    start: str = "upcycled"
    numbers: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)
    router_warmup_steps: int = 0
    mixed: bool = False
    budget: str = "tokens"
    base: Base = TINY

    @property
    def recipe(self) -> Recipe:
        """The arm's recipe.

        Raises:
            UpcyclingError: The arguments contradict each other.
        """
        base = self.base.dense if self.start == "dense" else self.base.upcycled
        recipe = with_arguments(base, {**self.base.numbers, **self.numbers})
        return replace(recipe, schedule=replace(recipe.schedule, **self.schedule))

    @property
    def needs_statistics(self) -> bool:
        """Whether an initializer reads statistics of the dense model."""
        return any(STATISTICS in str(value) for value in self.numbers.values())

    def flops_per_step(self, arch: Architecture) -> float:
        """Return the FLOPs per step, forward and backward, for a dense model's sizes."""
        return _flops_per_step(self.recipe, arch)

    def steps(self, steps: int, arch: Architecture) -> int:
        """Return the arm's number of steps.

        Args:
            steps: Number of steps of the baseline.
            arch: Architecture of the dense model.
        """
        if self.budget == "tokens":
            return steps
        total = steps * Arm(BASELINE, "", base=self.base).flops_per_step(arch)
        if self.budget == "all_flops":
            total += dense_run_flops(arch, self.base)
        # Round down, but not a whole number with a rounding error.
        return math.floor(total / self.flops_per_step(arch) + 1e-6)


@dataclass(frozen=True)
class Claim:
    """The claim that one arm has less of something than another.

    Attributes:
        text: The claim in words.
        source: The paper, with the paper's numbers.
        lower: Name of the arm that has less.
        higher: Name of the arm that has more.
        at: `end` or `start` of the training.
        of: `loss`, or a key of `Result.over_time`.
    """

    text: str
    source: str
    lower: str
    higher: str
    at: str = "end"
    of: str = "loss"


@dataclass(frozen=True)
class Study:
    """Arms that are compared with the first of them.

    Attributes:
        name: Name for `--study`.
        question: The study's question.
        arms: Names of the arms.
        claims: The papers' answers.
        note: How to read the table.
        shows_experts: Whether a second table shows routers and experts over time.
    """

    name: str
    question: str
    arms: tuple[str, ...]
    claims: tuple[Claim, ...]
    note: str = ""
    shows_experts: bool = False

    def of(self, arms: Collection[str]) -> "Study":
        """Return the study without the arms that are missing, and without claims on them."""
        kept = tuple(name for name in self.arms if name in arms)
        if kept == self.arms:
            return self
        claims = (claim for claim in self.claims if {claim.lower, claim.higher} <= {*kept})
        return replace(self, arms=kept, claims=tuple(claims), note="")


def dense_run_flops(arch: Architecture, base: Base = TINY) -> float:
    """Return the FLOPs of the dense model's own training, with the model's dense recipe."""
    return base.dense.schedule.max_steps * _flops_per_step(base.dense, arch)


def _flops_per_step(recipe: Recipe, arch: Architecture) -> float:
    schedule = recipe.schedule
    model = upcycled_model(arch, recipe.upcycling)
    return flops(model, schedule.seq_length).training * schedule.global_batch_size

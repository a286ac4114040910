"""The comparisons, and the papers' claims, as plain data.

The baseline is E8T2 with copies, a Mixtral-type router, no dropped tokens, and the learning rate
reset to the dense run's peak. An arm is a training with stated differences from the baseline. Arms
shared by several studies are trained once. A claim states which of two arms ends, or starts, with
the lower loss.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_upcycle_recipes.arguments import with_arguments
from nemo_upcycle_recipes.recipe import Recipe

from nemo_upcycle.ablations.bases import TINY, Base
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture
from nemo_upcycle.families.model import upcycled_model
from nemo_upcycle.planner.flops import flops

BUDGETS = ("tokens", "flops", "all_flops")
STARTS = ("upcycled", "dense", "scratch")


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
        budget: As many steps as the baseline (`tokens`), as many FLOPs as the baseline (`flops`),
            or as many FLOPs as the baseline and the preceding dense run together (`all_flops`).
        base: The model.
    """

    name: str
    label: str
    start: str = "upcycled"
    numbers: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)
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
        total = steps * replace(ARMS[BASELINE], base=self.base).flops_per_step(arch)
        if self.budget == "all_flops":
            total += dense_run_flops(arch, self.base)
        # Round down, but not a whole number with a rounding error.
        return math.floor(total / self.flops_per_step(arch) + 1e-6)


@dataclass(frozen=True)
class Claim:
    """The claim that one arm has a lower loss than another.

    Attributes:
        text: The claim in words.
        source: The paper, with the paper's numbers.
        lower: Name of the arm with the lower loss.
        higher: Name of the arm with the higher loss.
        at: `end` or `start` of the training.
    """

    text: str
    source: str
    lower: str
    higher: str
    at: str = "end"


@dataclass(frozen=True)
class Study:
    """Arms that are compared with the first of them.

    Attributes:
        name: Name for `--study`.
        question: The study's question.
        arms: Names of the arms.
        claims: The papers' answers.
        note: How to read the table.
    """

    name: str
    question: str
    arms: tuple[str, ...]
    claims: tuple[Claim, ...]
    note: str = ""

    def of(self, arms: Collection[str]) -> "Study":
        """Return the study without the arms that are missing, and without claims on them."""
        kept = tuple(name for name in self.arms if name in arms)
        if kept == self.arms:
            return self
        claims = (claim for claim in self.claims if {claim.lower, claim.higher} <= {*kept})
        return replace(self, arms=kept, claims=tuple(claims), note="")


_ST = {"moe_router_pre_softmax": True}
_G2 = {"granularity": 2, "moe_router_topk": 4}
_G4 = {"granularity": 4, "moe_router_topk": 8}
_G8 = {"granularity": 8, "moe_router_topk": 16}


def arms_with(base: Base) -> dict[str, Arm]:
    """Return all arms for a model, by name; the baseline is first.

    Arms that get the dense run's FLOPs are left out where those are unknown.
    """
    between = round((base.peak * base.minimum) ** 0.5, 5)
    dense_batch = base.dense.schedule.global_batch_size
    arms = (
        Arm("e8t2", "baseline: E8T2"),
        Arm("cf4", "CF 4", numbers={"moe_expert_capacity_factor": 4.0}),
        Arm("cf2", "CF 2", numbers={"moe_expert_capacity_factor": 2.0}),
        Arm("cf1", "CF 1", numbers={"moe_expert_capacity_factor": 1.0}),
        Arm("st", "ST-type, unscaled", numbers=_ST | {"weight_scaling": "none"}),
        Arm("st_paper", "ST-type, ∛ scaling", numbers=_ST | {"weight_scaling": "paper"}),
        Arm("st_exact", "ST-type, √ on up, down", numbers=_ST | {"weight_scaling": "exact"}),
        Arm("g2", "E8G2T4", numbers=_G2),
        Arm("g4", "E8G4T8", numbers=_G4),
        Arm("g8", "E8G8T16", numbers=_G8),
        Arm("g4_paper", "E8G4T8, ∛ scaling", numbers=_G4 | {"weight_scaling": "paper"}),
        Arm("g4_none", "E8G4T8, unscaled", numbers=_G4 | {"weight_scaling": "none"}),
        Arm(
            "lr_between",
            f"peak {between:g}",
            schedule={"lr": between},
        ),
        Arm(
            "lr_minimum",
            f"constant {base.minimum:g}",
            schedule={"lr": base.minimum, "warmup_steps": 0},
        ),
        Arm("drop", "drop(0.5)", numbers={"initializer": "drop(ratio=0.5)"}),
        Arm("noise", "noise(0.02; 0.5)", numbers={"initializer": "noise(std=0.02; fraction=0.5)"}),
        Arm("random", "random(0.02)", numbers={"initializer": "random(std=0.02)"}),
        Arm(
            "hybrid",
            "hybrid(copy; drop(0.5))",
            numbers={"initializer": "hybrid(copy; drop(ratio=0.5))"},
        ),
        Arm("dense", "dense, same tokens", start="dense"),
        Arm("dense_flops", "dense, same FLOPs", start="dense", budget="flops"),
        Arm("scratch", "scratch, same tokens", start="scratch"),
        Arm("scratch_flops", "scratch, dense run's FLOPs too", start="scratch", budget="all_flops"),
        Arm(
            "scratch_flops_dense",
            "the same, in the dense run's batches",
            start="scratch",
            numbers={"global_batch_size": dense_batch},
            budget="all_flops",
        ),
    )
    return {
        arm.name: replace(arm, base=base)
        for arm in arms
        if arm.budget != "all_flops" or base.trained_by_dense
    }


ARMS = arms_with(TINY)
"""The tiny model's arms by name; the baseline is first."""

BASELINE = next(iter(ARMS))

_REAL_CONTROLS = ("dense", "dense_flops", "scratch")
_LLAMA3, _NVIDIA = "arXiv 2412.09952", "arXiv 2410.07524"

_DROP_IS_LOWER = Claim(
    "Drop-Upcycling (ratio 0.5) ends lower than copies",
    "arXiv 2502.19261, over far longer trainings",
    "drop",
    "e8t2",
)

STUDIES = {
    study.name: study
    for study in (
        Study(
            "controls",
            "Does upcycling beat training the dense model on, or the MoE from scratch?",
            ("e8t2", "dense", "dense_flops", "scratch", "scratch_flops", "scratch_flops_dense"),
            (
                Claim(
                    "At equal tokens the MoE ends lower than the dense model trained on",
                    f"{_LLAMA3}, Table 4: MMLU 63.3 (dropless) to 62.4; {_NVIDIA}: validation loss "
                    "1.306 to 1.377",
                    "e8t2",
                    "dense",
                ),
                Claim(
                    "At equal FLOPs too",
                    "arXiv 2212.05055: the upcycled models pass the dense ones at 50% of the "
                    "dense pre-training's cost",
                    "e8t2",
                    "dense_flops",
                ),
                Claim(
                    "At equal tokens it ends lower than the same MoE from scratch",
                    "arXiv 2212.05055",
                    "e8t2",
                    "scratch",
                ),
                Claim(
                    "It does even if the MoE from scratch is given the dense run's FLOPs too",
                    "arXiv 2212.05055: better than sparse models from scratch on 100% of the dense "
                    "pre-training's budget",
                    "e8t2",
                    "scratch_flops",
                ),
                Claim(
                    "And if that one is trained in batches as large as the dense run's",
                    "arXiv 2212.05055, the same",
                    "e8t2",
                    "scratch_flops_dense",
                ),
            ),
            "FLOPs are a training's own. Arms that start from the dense model profit from that "
            "model's training. The last two arms get the FLOPs of that training on top, in one "
            "schedule: the first with the batch size of all arms, and so more steps; the second "
            "with the dense run's batch size. All arms have the same peak and final learning rate.",
        ),
        Study(
            "capacity_factor",
            "How many tokens may an expert take?",
            ("e8t2", "cf4", "cf2", "cf1"),
            (
                Claim(
                    "CF 2 ends lower than dropless",
                    f"{_LLAMA3}, Table 4: MMLU 64.0 to 63.3 (0-shot 63.9 to 63.7)",
                    "cf2",
                    "e8t2",
                ),
                Claim(
                    "CF 4 ends lower than dropless",
                    f"{_LLAMA3}, Table 4: MMLU 63.5 to 63.3; top-2 of 8 with CF 4 never drops a "
                    "token, so the two compute the same",
                    "cf4",
                    "e8t2",
                ),
                Claim(
                    "CF 1 ends higher than CF 2",
                    f"{_LLAMA3}, Table 4: MMLU 63.7 to 64.0 (0-shot 63.3 to 63.9)",
                    "cf2",
                    "cf1",
                ),
            ),
            "Nothing is padded, so all arms compute the same but for what is dropped. Losses are "
            "measured without dropping, as transformers would; beside them with the training's "
            "capacity, which 20 rows at a time share.",
        ),
        Study(
            "router",
            "Softmax after top-k (Mixtral-type) or before it (ST-type)?",
            ("e8t2", "st", "st_paper", "st_exact"),
            (
                Claim(
                    "Mixtral-type starts lower than ST-type",
                    f"{_LLAMA3}, router ablation",
                    "e8t2",
                    "st",
                    at="start",
                ),
                Claim(
                    "Mixtral-type ends lower than ST-type",
                    f"{_LLAMA3}, router ablation: converges faster",
                    "e8t2",
                    "st",
                ),
                Claim(
                    "ST-type with scaled weights ends lower than Mixtral-type",
                    f"{_NVIDIA}: softmax-then-top-k is better at scale",
                    "st_paper",
                    "e8t2",
                ),
                Claim("Scaling makes ST-type end lower", f"{_NVIDIA}, Eq. 2", "st_paper", "st"),
            ),
        ),
        Study(
            "granularity",
            "Fewer wide experts or many narrow ones, at the same compute a token (T = 2G)?",
            ("e8t2", "g2", "g4", "g8"),
            (
                Claim(
                    "64 experts (E8G8T16) end lower than 8",
                    f"{_NVIDIA}: the best granularity gives about 64 experts",
                    "g8",
                    "e8t2",
                ),
                Claim(
                    "16 experts (E8G2T4) end lower than 8",
                    f"{_NVIDIA}: finer is better up to about 64 experts",
                    "g2",
                    "e8t2",
                ),
            ),
        ),
        Study(
            "weight_scaling",
            "Must the weights of granular experts be scaled, and how?",
            ("g4", "g4_paper", "g4_none"),
            (
                Claim(
                    "Cube-root scaling ends lower than none",
                    f"{_NVIDIA}, Eq. 2",
                    "g4_paper",
                    "g4_none",
                ),
                Claim(
                    "The scaling that keeps the dense function (√G on up and down) starts lower "
                    "than the cube root",
                    "this project's rule; see `weight_scaling`",
                    "g4",
                    "g4_paper",
                    at="start",
                ),
                Claim(
                    "And ends lower",
                    "this project's rule; see `weight_scaling`",
                    "g4",
                    "g4_paper",
                ),
            ),
        ),
        Study(
            "learning_rate",
            "Back to the dense run's peak learning rate, or on at its minimum?",
            ("e8t2", "lr_between", "lr_minimum"),
            (
                Claim(
                    "Resetting the learning rate ends lower than going on at the minimum",
                    f"{_NVIDIA}: resetting the learning rate wins",
                    "e8t2",
                    "lr_minimum",
                ),
            ),
            "All but the constant one warm up and fall to the dense run's minimum along a cosine.",
        ),
        Study(
            "initializers",
            "Should experts start as copies?",
            ("e8t2", "drop", "noise", "random", "hybrid"),
            (
                _DROP_IS_LOWER,
                Claim(
                    "Copies start lower than Drop-Upcycling",
                    "arXiv 2502.19261: dropping costs knowledge at first",
                    "e8t2",
                    "drop",
                    at="start",
                ),
                Claim(
                    "Copies end lower than random experts",
                    "arXiv 2212.05055",
                    "e8t2",
                    "random",
                ),
            ),
        ),
    )
}
"""Studies by name for `--study`."""


REAL_MODEL = Study(
    "real_model",
    "Does upcycling a real model pay, and which way?",
    # In the order in which arms are left out where the time is short, from the end.
    ("e8t2", "dense", "dense_flops", "drop", "g4", "scratch"),
    (
        *(claim for claim in STUDIES["controls"].claims if claim.higher in _REAL_CONTROLS),
        _DROP_IS_LOWER,
        Claim(
            "32 experts in virtual groups (E8G4T8) end lower than 8",
            f"{_NVIDIA}: finer is better up to about 64 experts",
            "g4",
            "e8t2",
        ),
    ),
    "FLOPs are a training's own; those of the dense checkpoint's pre-training are not counted. All "
    "arms have the same learning rates, the ones of the upcycled recipe.",
)
"""The study of a recipe with a control: all that an hour on one GPU allows."""


def studies_named(names: list[str], base: Base = TINY) -> list[Study]:
    """Return the studies with these names; without names, the studies for the model.

    Args:
        names: Names of studies.
        base: The model, which may lack arms.

    Raises:
        UpcyclingError: There is no study with such a name.
    """
    offered = STUDIES if base.is_tiny else {REAL_MODEL.name: REAL_MODEL, **STUDIES}
    for name in names:
        if name not in offered:
            raise UpcyclingError(
                f"There is no study {name!r}; expected one of: {', '.join(offered)}."
            )
    wanted = names or list(STUDIES if base.is_tiny else [REAL_MODEL.name])
    return [study.of(arms_with(base)) for name, study in offered.items() if name in wanted]


def arms_of(studies: list[Study], base: Base = TINY) -> list[Arm]:
    """Return the distinct arms of studies, and the baseline, in the studies' order."""
    arms = arms_with(base)
    if len(studies) > 1 or base.is_tiny:
        names = {BASELINE, *(name for study in studies for name in study.arms)}
        return [arm for name, arm in arms.items() if name in names]
    return [arms[name] for name in dict.fromkeys([BASELINE, *studies[0].arms])]


def dense_run_flops(arch: Architecture, base: Base = TINY) -> float:
    """Return the FLOPs of the dense model's own training, with the model's dense recipe."""
    return base.dense.schedule.max_steps * _flops_per_step(base.dense, arch)


def most_sequences(steps: int, arch: Architecture, base: Base = TINY) -> int:
    """Return the number of sequences in the longest arm of all studies."""
    return max(
        arm.steps(steps, arch) * arm.recipe.schedule.global_batch_size
        for arm in arms_with(base).values()
    )


def _flops_per_step(recipe: Recipe, arch: Architecture) -> float:
    schedule = recipe.schedule
    model = upcycled_model(arch, recipe.upcycling)
    return flops(model, schedule.seq_length).training * schedule.global_batch_size

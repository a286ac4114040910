"""Whatever the planner is asked, every answer can be trained, and says why where there is none.

Random models, numbers of GPUs, hardware and settings: see `tests/planner_draws.py`.
"""

import ast
import re
from dataclasses import replace
from typing import Any

import pytest
from nemo_upcycle_recipes.expectations import mapping, workload
from nemo_upcycle_recipes.recipe import Recipe
from nemo_upcycle_recipes.scaled import scaled_recipe
from nemo_upcycle_recipes.tuned import Tuned, command, tuned

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.planner.nodes import of_job
from nemo_upcycle.planner.search import Prediction, fastest, predict, room
from nemo_upcycle.planner.space import Given
from nemo_upcycle.planner.step_time import least_time
from nemo_upcycle.plans.job import plan_job
from nemo_upcycle.plans.layout import validate
from tests.planner_draws import Draw, draw

REFUSALS = (
    "Nothing fits into",
    "No mapping of the model",
    "do not spread evenly over nodes",
    "GPUs are asked for, but",
    "num_gpus_per_node is",
    "experts are not",  # fewer experts than top-k
    "num_moe_experts",
    "recompute is",
    "uneven stages",
    "virtual stages",
)
"""The beginnings of what an impossible question may be answered with."""


def answer(asked: Draw) -> Tuned:
    """Return what `nemo-upcycle tune --dense` finds."""
    values = asked.values
    per_node = values.get("num_gpus_per_node", asked.kind.gpus_per_node)
    recipe = scaled_recipe(asked.dense, asked.gpus, per_node, values)
    return tuned(recipe, values, asked.gpus, asked.kind)


def trained(asked: Draw, found: Tuned) -> Recipe:
    """Return the recipe of the printed command, from the command alone."""
    line = command(found.recipe, asked.values, "drawn")
    arguments = line.split('"')[1].removeprefix("upcycle(").removesuffix(")").split(", ")
    pairs = dict(argument.split("=", 1) for argument in arguments)
    values: dict[str, Any] = {name: ast.literal_eval(text) for name, text in pairs.items()}
    gpus = values["num_nodes"] * values["num_gpus_per_node"]
    recipe = scaled_recipe(asked.dense, gpus, values["num_gpus_per_node"], values)
    return replace(recipe, num_nodes=values["num_nodes"])


def check(seed: int) -> bool:
    """Check one question; return whether there was a mapping."""
    asked = draw(seed)
    try:
        found = answer(asked)
    except UpcyclingError as error:
        assert any(words in str(error) for words in REFUSALS), error
        check_refusal(asked, str(error))
        return False
    recipe, best = trained(asked, found), found.tuning.best[0]
    assert recipe.world_size == asked.gpus
    assert recipe.num_gpus_per_node <= asked.kind.gpus_per_node
    assert mapping(recipe) == best.mapping
    assert workload(recipe).global_batch_size == best.workload.global_batch_size
    for name, value in asked.values.items():
        assert getattr_of(recipe, name) == value, name
    plan = asked.dense, recipe.upcycling, recipe.folding, recipe.num_nodes
    job = plan_job(*plan, recipe.num_gpus_per_node, recipe.precision)
    assert job.world_size == asked.gpus
    used = of_job(asked.kind, asked.gpus)
    for one in found.tuning.best:
        check_mapping(one, asked)
    assert [one.time.total for one in found.tuning.best] == sorted(
        one.time.total for one in found.tuning.best
    )
    check_more_is_never_slower(asked, best, recipe)
    assert used.gpus_per_node <= asked.kind.gpus_per_node
    return True


def getattr_of(recipe: Recipe, name: str) -> Any:
    """Return an argument of a recipe by name."""
    for part in (recipe, recipe.folding, recipe.upcycling, recipe.schedule):
        if hasattr(part, name):
            return getattr(part, name)
    raise AssertionError(name)


def check_mapping(one: Prediction, asked: Draw) -> None:
    """Check that a mapping is for all GPUs, fits model and memory, and is predicted right."""
    work = one.workload
    assert one.mapping.world_size == asked.gpus
    validate(work.arch, work.upcycling, one.mapping.folding, asked.gpus)
    assert one.memory.total <= room(asked.kind)
    again = predict(work, one.mapping, one.hardware)
    assert again.time == one.time
    assert again.memory == one.memory
    assert least_time(work, one.mapping, one.hardware) <= one.time.total


def check_more_is_never_slower(asked: Draw, best: Prediction, recipe: Recipe) -> None:
    """Check the best step on hardware with more of one thing, and that `fastest` finds the best."""
    allowed = Given(
        {name: value for name, value in vars(recipe.folding).items() if name in asked.values},
        asked.values.get("micro_batch_size"),
        asked.values.get("recompute"),
    )
    own = best.hardware
    same = fastest(best.workload, asked.gpus, own, allowed)
    assert same is not None
    assert (same.mapping, same.time) == (best.mapping, best.time)
    for name in ("memory_gib", "nvlink_bandwidth", "network_bandwidth", "memory_bandwidth"):
        more = replace(own, **{name: 1.5 * getattr(own, name)})
        faster = fastest(best.workload, asked.gpus, more, allowed)
        assert faster is not None
        assert faster.time.total <= best.time.total * (1 + 1e-9), name


def check_refusal(asked: Draw, error: str) -> None:
    """Check that what a refusal says is possible is so."""
    said = re.search(r"Possible: (.*?)\.(?: |$)", error)
    for way in said[1].split("; or ") if said else ():
        numbers = [int(text) for text in re.findall(r"\b\d+\b", way)]
        name, equals, _ = way.partition("=")
        for number in numbers:
            values = asked.values | ({name: number} if equals else {})
            gpus = asked.gpus if equals else number
            # The batch stays: without one, the recipe would take another for other GPUs.
            if not equals and "global_batch_size" not in values:
                batch = re.search(r"model and (\d+) sequences", error)
                assert batch is not None
                values["global_batch_size"] = int(batch[1])
            assert answer(replace(asked, gpus=gpus, values=values)).tuning.best, way


@pytest.mark.thorough
def test_every_answer_can_be_trained() -> None:
    answered = sum(check(seed) for seed in range(60))
    assert 15 < answered < 55


@pytest.mark.slow
@pytest.mark.parametrize("first", range(60, 2060, 100))
def test_more_questions(first: int) -> None:
    for seed in range(first, first + 100):
        check(seed)

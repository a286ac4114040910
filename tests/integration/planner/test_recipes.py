"""The planner on every recipe."""

from dataclasses import replace
from typing import Any

import pytest
from nemo_upcycle_recipes.expectations import expected, workload
from nemo_upcycle_recipes.numbers import RECIPES

from nemo_upcycle.config import RECOMPUTE
from nemo_upcycle.planner.search import search
from tests.planning import H100

FULL_SIZE = [recipe for recipe in RECIPES.values() if "tiny" not in recipe.name]


@pytest.mark.parametrize("recipe", FULL_SIZE, ids=lambda recipe: recipe.name)
def test_recipes_fit_and_are_near_the_best(recipe: Any) -> None:
    """A recipe fits, also in the uneven first steps; with the least recompute, near the fastest."""
    assert expected(recipe, H100).fits
    best = search(workload(recipe), recipe.world_size, H100)[0]
    names = RECOMPUTE if recipe.upcycling.num_moe_experts else ("none", "full")
    steady = [expected(replace(recipe, recompute=name), H100) for name in names]
    fastest = min((one for one in steady if one.fits), key=lambda one: one.time.total)
    # The paper's own mapping is what it is; its control's too.
    stated = recipe.name in ("llama3_8b_e8t2", "llama3_8b_dense")
    assert fastest.time.total < (1.45 if stated else 1.1) * best.time.total

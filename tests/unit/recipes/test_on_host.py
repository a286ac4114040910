"""The mapping of a trial on CPU, and what is said of memory."""

from dataclasses import replace
from typing import Any

import pytest
from nemo_upcycle_recipes import on_host as module
from nemo_upcycle_recipes.numbers import RECIPES
from nemo_upcycle_recipes.on_host import advice, needed, on_host, remember
from nemo_upcycle_recipes.recipe import Recipe
from nemo_upcycle_recipes.scaled import scaled_recipe

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.planner.host import GIB


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available", lambda: 16 * GIB)


def trial(name: str = "llama_tiny_e8t2", ranks: int = 1, **values: Any) -> tuple[Recipe, Any]:
    dense = RECIPES[name].dense_model
    return scaled_recipe(dense, ranks, ranks, values, on_cpu=True), values


@pytest.mark.parametrize(("ranks", "experts", "ep"), [(1, 8, 1), (2, 8, 2), (4, 6, 2), (3, 8, 1)])
def test_experts_are_spread_over_the_ranks(ranks: int, experts: int, ep: int) -> None:
    chosen = on_host(*trial(ranks=ranks, num_moe_experts=experts))
    assert chosen.folding.expert_model_parallel_size == ep


def test_what_is_given_is_kept() -> None:
    given = {"micro_batch_size": 1, "recompute": "full", "expert_model_parallel_size": 1}
    chosen = on_host(*trial(ranks=2, **given))
    assert (chosen.schedule.micro_batch_size, chosen.recompute) == (1, "full")
    assert chosen.folding.expert_model_parallel_size == 1


def test_the_control_has_no_experts_to_recompute() -> None:
    chosen = on_host(*trial(num_moe_experts=None))
    assert (chosen.upcycling.num_moe_experts, chosen.recompute) == (None, "none")


def test_too_little_memory_is_told_before_anything_starts() -> None:
    with pytest.raises(UpcyclingError) as told:
        on_host(*trial("llama32_1b_e8t2", ranks=2))
    for words in ("more than the 16.0 GiB that are available: 2 ranks", "fewer ranks"):
        assert words in str(told.value)
    assert on_host(*trial("llama32_1b_e8t2"), check=False).world_size == 1


def test_fewer_experts_are_named_if_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, names = trial("llama32_1b_e8t2")
    smaller = replace(recipe, upcycling=replace(recipe.upcycling, num_moe_experts=2))
    small = on_host(smaller, names, check=False)
    monkeypatch.setattr(module, "available", lambda: int(needed(small)))
    with pytest.raises(UpcyclingError, match="Use num_moe_experts=2, or"):
        on_host(recipe, names)


def test_a_batch_that_does_not_divide_is_told() -> None:
    with pytest.raises(UpcyclingError, match="A global batch of 8 does not divide"):
        on_host(*trial(micro_batch_size=3, global_batch_size=8))


def test_advice_after_a_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_last", [])
    assert advice() == ""
    recipe, _ = trial()
    remember(recipe, recipe.architecture, 2)
    assert advice().startswith("2 rank(s) were expected to need ")

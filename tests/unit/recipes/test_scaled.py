"""The numbers of the recipe for any dense model."""

from dataclasses import replace
from typing import Any

import pytest
from nemo_upcycle_recipes.numbers import LLAMA3_8B_E8T2, RECIPES
from nemo_upcycle_recipes.scaled import scaled_recipe, scaled_schedule, why

from nemo_upcycle.checkpoint.described import Dense


def dense(name: str) -> Dense:
    return RECIPES[name].dense_model


def test_for_the_papers_model_the_numbers_are_the_papers() -> None:
    found = scaled_schedule(dense("llama3_8b_e8t2"), gpus=512, values={})
    assert found == LLAMA3_8B_E8T2.schedule


def test_a_wider_model_learns_more_slowly_and_not_longer() -> None:
    found = scaled_schedule(dense("llama31_70b_e8t2"), gpus=512, values={})
    assert (found.lr, found.min_lr) == (1.5e-5, 1.5e-7)
    assert (found.train_tokens, found.global_batch_size) == (100_000_000_000, 512)


def test_a_small_model_sees_fewer_tokens_in_smaller_batches() -> None:
    found = scaled_schedule(dense("llama32_1b_e8t2"), gpus=8, values={})
    assert (found.lr, found.min_lr) == (6e-5, 6e-7)
    assert found.train_tokens == pytest.approx(
        12.45 * dense("llama32_1b_e8t2").parameters, rel=0.01
    )
    assert (found.global_batch_size, found.seq_length) == (256, 8192)


@pytest.mark.parametrize(
    ("values", "gpus", "batch"),
    [
        ({"seq_length": 4096}, 512, 1024),  # as many tokens
        ({}, 96, 480),  # a multiple of the GPUs
        ({"global_batch_size": 100}, 96, 100),  # as given
        ({}, 4096, 4096),
    ],
)
def test_the_batch(values: dict[str, Any], gpus: int, batch: int) -> None:
    found = scaled_schedule(dense("llama3_8b_e8t2"), gpus, values)
    assert found.global_batch_size == batch


def test_the_sequence_is_no_longer_than_the_models_context() -> None:
    model = dense("llama3_8b_e8t2")
    short = replace(model, arch=replace(model.arch, max_position_embeddings=2048))
    assert scaled_schedule(short, gpus=8, values={}).seq_length == 2048


@pytest.mark.parametrize(("steps", "warmup"), [(2, 0), (50, 5), (None, 100)])
def test_warm_up_is_at_most_a_tenth(steps: int | None, warmup: int) -> None:
    found = scaled_schedule(dense("llama3_8b_e8t2"), 8, {}, max_steps=steps)
    assert found.warmup_steps == warmup


def test_a_run_on_cpu_is_a_trial() -> None:
    recipe = scaled_recipe(dense("llama_tiny_e8t2"), 2, 2, {}, on_cpu=True)
    assert (recipe.schedule.seq_length, recipe.schedule.global_batch_size) == (256, 8)
    assert recipe.precision == "32"


def test_none_keeps_the_model_dense() -> None:
    recipe = scaled_recipe(dense("llama3_8b_e8t2"), 8, 8, {"num_moe_experts": None})
    assert recipe.upcycling.num_moe_experts is None
    assert scaled_recipe(dense("llama3_8b_e8t2"), 8, 8, {}).upcycling.label == "E8T2"
    granular = scaled_recipe(
        dense("llama3_8b_e8t2"), 8, 8, {"granularity": 4, "moe_router_topk": 8}
    )
    assert granular.upcycling.label == "E8G4T8"


def test_every_number_has_its_reason() -> None:
    recipe = scaled_recipe(dense("llama32_1b_e8t2"), 8, 8, {})
    text = "\n".join(why(recipe))
    for words in (
        "6e-05 → 6e-07: 3e-05 → 3e-07 of arXiv 2412.09952 · 4096 / 2048",
        "15.4B tokens, 7,3",
        "256 sequences of 8192 per step, 2.1M tokens",
    ):
        assert words in text
    assert "per step: a trial on CPU" in "\n".join(why(recipe, on_cpu=True))

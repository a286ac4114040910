"""Operations are the paper's, and what torch counts of Megatron's real models."""

from dataclasses import replace

import pytest
from nemo_upcycle_recipes.numbers import LLAMA3_8B_DENSE, LLAMA3_8B_E8T2

from nemo_upcycle.families.model import upcycled_model
from nemo_upcycle.planner.flops import flops

LLAMA3 = LLAMA3_8B_E8T2.architecture


@pytest.mark.parametrize(
    ("recipe", "full", "causal"),
    [(LLAMA3_8B_E8T2, 7.515e14, 6.987e14), (LLAMA3_8B_DENSE, 4.744e14, 4.216e14)],
)
def test_llama_3_8b_as_in_the_paper(recipe, full: float, causal: float) -> None:
    counted = flops(upcycled_model(recipe.architecture, recipe.upcycling), 8192)
    assert counted.training_full_attention == pytest.approx(full, rel=1e-3)
    assert counted.training == pytest.approx(causal, rel=1e-3)


@pytest.mark.parametrize(("window", "seen"), [(None, 0.5), (16, 0.5), (4, 24 / 64), (1, 7.5 / 64)])
def test_a_window_is_what_a_token_sees(window: int | None, seen: float) -> None:
    model = upcycled_model(replace(LLAMA3, sliding_window=window), LLAMA3_8B_E8T2.upcycling)
    counted = flops(model, 8)
    assert counted.causal_attention == pytest.approx(seen * counted.attention)

"""What would fit, where nothing fits."""

from dataclasses import replace

from nemo_upcycle.planner.remedies import fewer_experts, fewest_gpus, fits, remedies
from tests.planning import H100, PAPER


def test_the_remedies_fit() -> None:
    assert not fits(PAPER, 8, H100)
    assert remedies(PAPER, 8, H100) == ["num_moe_experts=4 on the same GPUs", "16 GPUs"]
    assert fits(PAPER, 16, H100)
    (four, two) = fewer_experts(PAPER.upcycling)
    assert (four.num_moe_experts, two.num_moe_experts) == (4, 2)
    assert fits(replace(PAPER, upcycling=four), 8, H100)


def test_settings_that_keep_a_run_from_fitting_are_named() -> None:
    left_open, *_ = remedies(PAPER, 16, H100, lambda mapping: mapping.recompute == "none")
    assert left_open == "the same GPUs, with mapping and recompute left to the planner"


def test_a_dense_model_has_no_fewer_experts() -> None:
    assert list(fewer_experts(replace(PAPER.upcycling, num_moe_experts=None))) == []


def test_a_model_that_never_fits_has_no_remedy() -> None:
    tiny = replace(H100, memory_gib=1)
    assert fewest_gpus(PAPER, tiny, 8) is None
    assert remedies(PAPER, 8, tiny) == []

"""What fits into a number of minutes, and what is left out first."""

from dataclasses import replace
from pathlib import Path

import pytest

from nemo_upcycle.ablations.bases import base_of
from nemo_upcycle.ablations.budget import (
    RESERVE,
    Cost,
    Plan,
    keep_plan,
    kept_plan,
    plan,
    same_model,
)
from nemo_upcycle.ablations.studies import REAL_MODEL, arms_of, studies_named
from nemo_upcycle.errors import UpcyclingError

BASE = base_of("smollm2_135m_e8t2")
ARMS = arms_of(studies_named([], BASE), BASE)
ARCH = BASE.upcycled.architecture
MOST = BASE.upcycled.schedule.max_steps
COSTS = {arm.name: Cost(0.2 if arm.start == "dense" else 0.5, 30.0) for arm in ARMS}


def seconds_of(chosen: Plan) -> float:
    arms = [arm for arm in ARMS if arm.name in chosen.arms]
    return chosen.seeds * sum(
        COSTS[arm.name].other + arm.steps(chosen.steps, ARCH) * COSTS[arm.name].per_step
        for arm in arms
    )


def chosen(minutes: float, seeds: int = 3, least: int = 100) -> Plan:
    return plan(ARMS, seeds, 60 * minutes, COSTS, ARCH, least)


def test_with_time_enough_all_is_trained() -> None:
    found = chosen(1000)
    assert found == Plan(REAL_MODEL.arms, 3, MOST)


@pytest.mark.parametrize("minutes", [12, 20, 30, 60, 90])
def test_what_is_chosen_fits_and_more_steps_would_not(minutes: float) -> None:
    found = chosen(minutes)
    available = 60 * minutes * (1 - RESERVE)
    assert seconds_of(found) <= available
    assert found.steps == MOST or seconds_of(replace(found, steps=found.steps + 1)) > available


def test_steps_then_seeds_then_arms_then_the_second_seed_are_left_out() -> None:
    found = [chosen(minutes) for minutes in (100, 40, 20, 8, 3.5)]
    assert found[0].seeds == 3 and found[0].arms == REAL_MODEL.arms
    sizes = [(one.seeds > 1, len(one.arms), one.seeds, one.steps) for one in found]
    assert sizes == sorted(sizes, reverse=True)
    for one in found:
        assert one.arms == REAL_MODEL.arms[: len(one.arms)]
        assert one.seeds > 1 or len(one.arms) == 2
        assert one.steps >= 100 or (len(one.arms), one.seeds) == (2, 1)
        assert one.seeds == 3 or len(one.arms) == len(REAL_MODEL.arms) or one.seeds <= 2
    assert f"of the recipe's {MOST}" in found[1].left_out[0]
    assert any("seeds beyond 2 of 3" in said for said in found[2].left_out)
    assert any("scratch" in said for said in found[3].left_out)


def test_too_few_minutes_are_one_error() -> None:
    with pytest.raises(UpcyclingError, match=r"1 minutes are too few: .* takes 60 s"):
        chosen(1)


def test_a_plan_is_kept_for_the_same_question_alone(tmp_path: Path) -> None:
    path, asked = tmp_path / "plan.json", {"arms": ("e8t2",), "seeds": 3}
    assert kept_plan(path, asked) is None
    keep_plan(path, asked, chosen(20))
    assert kept_plan(path, asked) == chosen(20)
    assert kept_plan(path, asked | {"seeds": 2}) is None
    path.write_text("{")
    assert kept_plan(path, asked) is None


def test_arms_of_the_same_shape_need_one_trial() -> None:
    kinds = {same_model(arm, ARCH) for arm in ARMS}
    assert len(kinds) == 3  # E8T2 however it starts, dense, granular


class TestBases:
    def test_a_recipe_has_its_control(self) -> None:
        assert BASE.dense.name == "smollm2_135m_dense"
        assert {arm.recipe.name for arm in ARMS} == {"smollm2_135m_e8t2", "smollm2_135m_dense"}
        assert {arm.recipe.schedule.lr for arm in ARMS} == {2.1e-4}
        assert {arm.recipe.schedule.tokens_per_step for arm in ARMS} == {64 * 2048}

    def test_settings_are_of_both_recipes(self) -> None:
        base = base_of("smollm2_135m_e8t2", "cpu", ["seq_length=64", "precision=32"])
        recipes = [arm.recipe for arm in arms_of(studies_named([], base), base)]
        assert {(one.schedule.seq_length, one.precision) for one in recipes} == {(64, "32")}

    def test_what_needs_the_dense_runs_flops_is_left_out(self) -> None:
        (controls,) = studies_named(["controls"], BASE)
        assert controls.arms == ("e8t2", "dense", "dense_flops", "scratch")
        assert {claim.higher for claim in controls.claims} <= {*controls.arms}

    @pytest.mark.parametrize(
        ("name", "accelerator", "settings", "message"),
        [
            ("llama32_1b_e8t2", "gpu", [], "no upcycled recipe with a control; .*smollm2_135m"),
            ("smollm2_135m_dense", "gpu", [], "no upcycled recipe with a control"),
            ("nothing", "gpu", [], "There is no recipe 'nothing'"),
            ("smollm2_135m_e8t2", "tpu", [], "accelerator is 'tpu'"),
            ("smollm2_135m_e8t2", "gpu", ["nope=1"], "'nope=1' is not an argument"),
            ("llama_tiny_e8t2", "gpu", [], "compared on CPU"),
        ],
    )
    def test_others_are_refused(
        self, name: str, accelerator: str, settings: list[str], message: str
    ) -> None:
        with pytest.raises(UpcyclingError, match=message):
            base_of(name, accelerator, settings)

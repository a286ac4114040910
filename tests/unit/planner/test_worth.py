"""The scaling law of upcycling, its range, and the comparison that uses it."""

import random
from dataclasses import replace
from math import inf, isinf, log, log10
from typing import Any

import pytest

from nemo_upcycle.checkpoint.described import dense_of_config
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.families.model import upcycled_model
from nemo_upcycle.planner.workload import Workload
from nemo_upcycle.planner.worth import comparison, law
from nemo_upcycle.planner.worth.comparison import SAME_COST, SAME_TOKENS, SCRATCH, UPCYCLE, worth
from nemo_upcycle.planner.worth.law import (
    TABLE_2,
    Interval,
    break_even,
    dense_loss,
    scratch_loss,
    scratch_tokens,
    upcycled_loss,
)
from nemo_upcycle.planner.worth.published import OLMOE_PARAMETERS, OLMOE_TOKENS
from nemo_upcycle.planner.worth.scope import outside
from tests.planning import H100
from tests.tiny import LLAMA_400M

# The laws once more, as arXiv 2502.03009 prints the numbers in its Table 2.
E = 0.165


def dense(d: float, n: float) -> float:
    return 8.83 * d**-0.088 + 12.3 * n**-0.116 + E


def scratch(d: float, n: float) -> float:
    return 32.0 * d**-0.161 + 7.05 * n**-0.080 + E


def upcycled(d1: float, d2: float, n: float) -> float:
    return 16.3 * d1**-0.043 * d2 ** (-0.085 + 7.98e-4 * log(d1)) + 8.53 * n**-0.112 + E


GRID = [
    (n, d1, d2) for n in (15e6, 44e6, 4e8, 1e9) for d1 in (1e9, 74e9, 368e9) for d2 in (1e9, 37e9)
]


@pytest.mark.parametrize(("n", "d1", "d2"), GRID)
def test_the_laws_are_those_of_table_2(n: float, d1: float, d2: float) -> None:
    assert dense_loss(n, d1).value == pytest.approx(dense(d1, n), rel=1e-12)
    assert scratch_loss(n, d2).value == pytest.approx(scratch(d2, n), rel=1e-12)
    assert upcycled_loss(n, d1, d2).value == pytest.approx(upcycled(d1, d2, n), rel=1e-12)


def test_values_computed_by_hand() -> None:
    found = dense_loss(1e9, 1e11), scratch_loss(1e9, 1e11), upcycled_loss(1e9, 1e11, 1e11)
    assert [one.value for one in found] == pytest.approx([2.227, 2.051, 2.065], abs=0.0006)


@pytest.mark.parametrize(("n", "d1", "d2"), GRID)
def test_more_tokens_and_parameters_lower_the_loss(n: float, d1: float, d2: float) -> None:
    here = upcycled_loss(n, d1, d2)
    for more in (upcycled_loss(2 * n, d1, d2), upcycled_loss(n, d1, 2 * d2)):
        assert all(new < old for new, old in zip(more, here, strict=True))
    for curve in (dense_loss, scratch_loss):
        assert all(new < old for new, old in zip(curve(n, 2 * d1), curve(n, d1), strict=True))
        assert all(new < old for new, old in zip(curve(2 * n, d1), curve(n, d1), strict=True))


HALVES = {
    "dense": {"a": 0.005, "b": 0.05, "alpha_1": 0.0005, "beta": 0.0005},
    "scratch": {"a": 0.05, "b": 0.005, "alpha_1": 0.0005, "beta": 0.0005},
    "upcycled": {
        "a": 0.05,
        "b": 0.005,
        "alpha_1": 0.0005,
        "beta": 0.0005,
        "alpha_2": 0.0005,
        "alpha_3": 0.5e-6,
    },
}
"""Half a unit of the last printed digit."""


def drawn(name: str, rng: random.Random) -> law.Law:
    """Draw numbers that are all printed as in Table 2."""
    values = {
        key: float(text) + HALVES[name][key] * rng.uniform(-1, 1)
        for key, text in TABLE_2[name].items()
    }
    return law.Law(**values)


def test_the_range_holds_all_numbers_that_are_printed_alike() -> None:
    rng = random.Random(0)
    for n, d1, d2 in GRID:
        wide = upcycled_loss(n, d1, d2)
        assert wide.low < wide.value < wide.high
        losses = [drawn("upcycled", rng).loss(n, d1, d2) + E for _ in range(100)]
        assert wide.low <= min(losses) <= max(losses) <= wide.high
        # The corner itself is printed alike, so that the range is not too wide either.
        assert law.law("upcycled", 1).a == pytest.approx(16.35)
        assert law.law("upcycled", 1).alpha_2 == pytest.approx(0.0845)


def scanned(n: float, d1: float, theirs: law.Law, ours: law.Law, most: float) -> float:
    """Return the first crossing on a grid of 0.1%."""
    tokens = law.LEAST_TOKENS
    while theirs.loss(n, tokens) > ours.loss(n, d1, tokens):
        tokens *= 1.001
        if tokens > most:
            return inf
    return tokens


@pytest.mark.parametrize("n", [15e6, 1e8, 4e8, 1e9])
@pytest.mark.parametrize("d1", [1e9, 1e10, 74e9, 368e9])
def test_the_break_even_is_where_a_fine_scan_finds_the_first_crossing(n: float, d1: float) -> None:
    for most in (law.MOST_TOKENS, law.FARTHEST_TOKENS):
        found = break_even(n, d1, most)
        assert found.low <= found.value <= found.high
        want = scanned(n, d1, law.law("scratch"), law.law("upcycled"), most)
        assert found.value == pytest.approx(want, rel=2e-3)


def test_rounding_moves_the_break_even_within_the_range() -> None:
    rng = random.Random(1)
    for n, d1 in ((4e8, 1e10), (1e9, 1e10), (4e8, 74e9)):
        wide = break_even(n, d1, law.MOST_TOKENS)
        for _ in range(20):
            one = scanned(n, d1, drawn("scratch", rng), drawn("upcycled", rng), law.MOST_TOKENS)
            assert wide.low / 1.002 <= one <= wide.high * 1.002


def test_beyond_the_break_even_scratch_takes_fewer_tokens() -> None:
    n, d1 = 1e9, 1e10
    at = break_even(n, d1).value
    assert scratch_tokens(n, d1, at / 2).value > at / 2
    assert scratch_tokens(n, d1, at).value == pytest.approx(at, rel=1e-4)
    assert scratch_tokens(n, d1, at * 2).value < at * 2


@pytest.mark.parametrize(("n", "d1", "d2"), GRID)
def test_scratch_reaches_the_upcycled_loss(n: float, d1: float, d2: float) -> None:
    found = scratch_tokens(n, d1, d2)
    assert found.low < found.value < found.high
    assert scratch(found.value, n) == pytest.approx(upcycled(d1, d2, n))


def test_a_loss_below_what_scratch_can_reach_takes_infinitely_many_tokens() -> None:
    assert isinf(scratch_tokens(1e9, 1e14, 1e25).value)


def test_with_a_decimal_logarithm_scratch_would_never_catch_up() -> None:
    """Which is why the logarithm is taken to be natural: the paper's MoEs do catch up."""
    for n in (15e6, 1e8, 1e9):
        for d1 in (10e9, 74e9, 368e9):
            for power in range(90, 116):
                d2 = 10 ** (power / 10)
                tens = 16.3 * d1**-0.043 * d2 ** (-0.085 + 7.98e-4 * log10(d1))
                assert tens + 8.53 * n**-0.112 + E < scratch(d2, n)


def test_the_law_contradicts_olmoe() -> None:
    """OLMoE's MoE from scratch catches up after 500B tokens; by the law it never does."""
    assert isinf(break_even(OLMOE_PARAMETERS, OLMOE_TOKENS, law.FARTHEST_TOKENS).value)


# --- The range ----------------------------------------------------------------------------------

MODEL = dense_of_config(LLAMA_400M, "model", "")
E8T2 = upcycled_model(MODEL.arch, UpcyclingConfig())


def found_outside(
    n: float = 4e8, d1: float = 74e9, d2: float = 20e9, **experts: Any
) -> tuple[str, ...]:
    model = upcycled_model(MODEL.arch, UpcyclingConfig(**experts)) if experts else E8T2
    return tuple(outside(model, n, d1, d2))


def test_inside_nothing_is_refused() -> None:
    assert found_outside() == ()
    assert found_outside(n=15e6, d1=1e9, d2=1e9) == ()
    assert found_outside(n=1e9, d1=368e9, d2=368e9) == ()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"n": 7e9}, ("N1", "7.00B", "15.0M to 1.00B")),
        ({"n": 14e6}, ("N1", "14.0M", "15.0M to 1.00B")),
        ({"d1": 15e12}, ("D1", "15.0T", "up to 368B")),
        ({"d1": 9e8}, ("D1", "900M", "not used below 1.00B")),
        ({"d2": 1e12}, ("D2", "1.00T", "up to 368B")),
        ({"num_moe_experts": 4}, ("experts per layer: 4", "for 8")),
        ({"moe_router_topk": 4}, ("experts per token: 4", "for 2")),
        ({"num_moe_experts": 8, "granularity": 2}, ("granularity: 2", "for 1")),
        ({"moe_layer_freq": 2}, ("MoE layers: 12", "for all 24")),
    ],
)
def test_what_is_outside_is_named(values: dict[str, float], words: tuple[str, ...]) -> None:
    (said,) = found_outside(**values)
    assert all(word in said for word in words), said


# --- The comparison -----------------------------------------------------------------------------

WORKLOAD = Workload(MODEL.arch, UpcyclingConfig(), 2048, 256)


def compared(d1: float = 74e9, d2: float = 20e9, extrapolate: bool = False) -> comparison.Worth:
    return worth(WORKLOAD, MODEL, 8, H100, d1, d2, extrapolate)


def test_the_ways_cost_what_the_planner_says() -> None:
    found = compared()
    moe = 8 / found.moe.tokens_per_second / 3600
    plain = 8 / found.dense.tokens_per_second / 3600
    assert plain < moe
    ways = found.ways
    assert ways[UPCYCLE].gpu_hours == pytest.approx([20e9 * moe] * 3)
    assert ways[SAME_TOKENS].gpu_hours == pytest.approx([20e9 * plain] * 3)
    assert ways[SAME_COST].gpu_hours == pytest.approx(ways[UPCYCLE].gpu_hours)
    assert ways[SAME_COST].tokens == pytest.approx([20e9 * moe / plain] * 3)
    again = ways[SCRATCH].tokens
    assert again is not None
    assert ways[SCRATCH].gpu_hours == pytest.approx([tokens * moe for tokens in again])
    assert found.sunk_hours == pytest.approx(74e9 * plain)


def test_the_losses_are_those_of_the_law() -> None:
    found, n = compared(), comparison.non_embedding(MODEL)
    assert n == MODEL.parameters - 2 * 32_000 * 1024
    ways = found.ways
    assert ways[UPCYCLE].loss == ways[SCRATCH].loss == upcycled_loss(n, 74e9, 20e9)
    assert ways[SAME_TOKENS].loss == dense_loss(n, 94e9)
    tokens = ways[SAME_COST].tokens
    assert tokens is not None
    assert ways[SAME_COST].loss == dense_loss(n, 74e9 + tokens.value)
    assert found.break_even == break_even(n, 74e9)
    assert found.dense_now == dense_loss(n, 74e9)


def test_tied_embeddings_are_counted_once() -> None:
    tied = dense_of_config(LLAMA_400M | {"tie_word_embeddings": True}, "model", "")
    assert comparison.non_embedding(tied) == comparison.non_embedding(MODEL)


def test_a_dense_model_trained_beyond_the_range_has_no_loss() -> None:
    ways = compared(d1=360e9).ways
    assert ways[UPCYCLE].loss is not None
    assert ways[SAME_TOKENS].loss is None
    assert ways[SAME_TOKENS].gpu_hours is not None
    assert ways[SAME_TOKENS].gpu_hours.value > 0


def test_outside_there_are_costs_and_no_losses() -> None:
    found = compared(d1=15e12)
    assert not found.has_losses
    assert found.break_even is found.dense_now is None
    assert found.advantages == {}
    assert [name for name, way in found.ways.items() if way.gpu_hours is None] == [SCRATCH]
    assert all(way.loss is None for way in found.ways.values())
    forced = compared(d1=15e12, extrapolate=True)
    assert forced.extrapolated
    assert all(way.loss is not None for way in forced.ways.values())
    assert not compared(extrapolate=True).extrapolated  # nothing is outside


def test_what_rounding_leaves_open_is_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    few = compared(d1=74e9, d2=2e9)
    low, _, high = scratch_tokens(few.parameters, 74e9, 2e9)
    assert low > 2e9
    assert few.advantages[SCRATCH] is True
    open_ = compared(d1=74e9, d2=40e9)
    low, _, high = scratch_tokens(open_.parameters, 74e9, 40e9)
    assert low < 40e9 < high
    assert open_.advantages[SCRATCH] is None
    late = compared(d1=1e9, d2=300e9)
    assert late.advantages[SCRATCH] is False
    assert late.advantages[SAME_TOKENS] is True
    fixed = Interval(9.0, 9.0, 9.0)
    monkeypatch.setattr(law, "dense_loss", lambda *_: fixed)
    assert replace(few).advantages[SAME_COST] is True

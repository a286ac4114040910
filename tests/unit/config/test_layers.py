"""Which layers become MoE layers."""

from typing import Any

import pytest

from nemo_upcycle.config.layers import megatron_layer_freq, moe_layers
from nemo_upcycle.errors import UpcyclingError


@pytest.mark.parametrize(
    ("freq", "pattern"),
    [
        (1, "111111"),
        (2, "101010"),
        (4, "100010"),
        ("3", "100100"),
        ((0, 1, 0, 0, 1, 1), "010011"),
        ([1, 0, 0, 0, 0, 0], "100000"),
        ("[0]*2+[1]*4", "001111"),
        ("[0, 1, 1, 0, 1, 0]", "011010"),
        ("[0;1;1;0;1;0]", "011010"),
        ("([0]+[1])*3", "010101"),
        ("skip_first=1", "011111"),
        ("skip_last=2", "111100"),
        ("skip_first=1, skip_last=1", "011110"),
        ("skip_first=1;every=2", "010101"),
    ],
)
def test_patterns(freq: Any, pattern: str) -> None:
    assert moe_layers(freq, 6) == tuple(letter == "1" for letter in pattern)


def test_megatron_has_the_same_pattern() -> None:
    """Megatron-Core makes a list of a number by the same rule."""
    assert megatron_layer_freq(1, 6) == megatron_layer_freq("[1]*6", 6) == 1
    assert megatron_layer_freq(2, 5) == [int(i % 2 == 0) for i in range(5)]


@pytest.mark.parametrize(
    ("freq", "message"),
    [
        (0, "expected 1 or more"),
        ((1, 1), "has 2 layers"),
        ((1, 1, 1, 1, 1, 2), "expected 0 or 1"),
        ("[0]*6", "leaves no MoE layer"),
        ("skip_first=6", "leaves no MoE layer"),
        ("skip_some=1", "expected a number"),
        ("every=0", "expected a number"),
        ("__import__('os')", "expected a number"),
        ("[1]*10**9", "expected a number"),
        ("[1]*999999999", "has 10000 layers"),
        ("", "expected a number"),
    ],
)
def test_bad_patterns_are_refused(freq: Any, message: str) -> None:
    with pytest.raises(UpcyclingError, match=message):
        moe_layers(freq, 6)

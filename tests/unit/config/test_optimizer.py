"""How the optimizer is stored."""

from typing import Any

import pytest

from nemo_upcycle.config import OptimizerStorage
from nemo_upcycle.errors import UpcyclingError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer_state": "int8"}, "optimizer_state is 'int8'; expected one of: fp32, bf16"),
        ({"optimizer_offload_fraction": 1.5}, "is 1.5; expected 0 to 1"),
        ({"optimizer_offload_fraction": -0.1}, "is -0.1; expected 0 to 1"),
        ({"optimizer_offload_fraction": float("nan")}, "is nan; expected 0 to 1"),
        ({"optimizer_offload_fraction": 0.5, "optimizer_state": "bf16"}, "moments in fp32"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UpcyclingError, match=message):
        OptimizerStorage(**values)


def test_only_what_is_special_is_said() -> None:
    assert str(OptimizerStorage()) == ""
    assert OptimizerStorage().is_default
    half = OptimizerStorage(optimizer_offload_fraction=0.5, grad_reduce_in_fp32=False)
    assert str(half) == "50% of the optimizer on the CPUs, gradients in bf16"
    assert half.chosen == {"optimizer_offload_fraction": 0.5, "grad_reduce_in_fp32": False}

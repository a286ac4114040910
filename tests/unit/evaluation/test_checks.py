"""What is checked before an evaluation."""

import pytest

from nemo_upcycle.errors import UpcyclingError


def test_rows_are_as_long_as_every_model_takes() -> None:
    from nemo_upcycle.evaluation.checks import Described, row_length

    models = [Described("moe", 512, 64), Described("dense", 512, 256), Described("x", 512, None)]
    assert row_length(models) == 64
    assert row_length(models, wanted=32) == 32
    assert row_length(models, earlier=48) == 48
    assert row_length(models, earlier=256) == 64
    assert row_length(models[2:]) is None
    with pytest.raises(UpcyclingError, match="at most the context length of moe, 64"):
        row_length(models, wanted=65)

"""What is said where nothing fits."""

import pytest

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.planner.tuning import tune
from tests.planning import H100, PAPER


def test_nothing_fits_says_what_is_needed() -> None:
    with pytest.raises(UpcyclingError, match=r"on 8 GPUs: .* needs the least memory, \d+ GiB"):
        tune(PAPER, 8, H100)
    with pytest.raises(UpcyclingError, match="No mapping of the model"):
        tune(PAPER, 7 * 11, H100)

"""A run's record says which statistics its initializers have read."""

from dataclasses import asdict
from pathlib import Path

import pytest

from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.engine.provenance import Origin
from nemo_upcycle.errors import UpcyclingError
from tests.calibrations import write_statistics
from tests.tiny import write_llama


def test_a_run_goes_on_with_its_statistics_or_without_the_file(tmp_path: Path) -> None:
    dense = write_llama(tmp_path / "dense")
    one, two = (write_statistics(tmp_path / name, dense) for name in ("one", "two"))
    config = UpcyclingConfig(
        initializer=f"hybrid(copy, partial(stats={str(one)!r}))",
        router_initializer=f"centroids(stats={str(two)!r})",
    )

    def origin() -> Origin:
        return Origin.of("dense", None, config)

    began = origin()
    assert began.statistics.keys() == {str(one), str(two)}
    assert Origin.of("dense", None, UpcyclingConfig()).statistics == {}
    assert Origin.of("dense", None, UpcyclingConfig(num_moe_experts=None)).statistics == {}
    began.check(origin(), "run")
    write_statistics(one, dense, seed_of_sample=7)
    with pytest.raises(UpcyclingError, match=f"other statistics than those that are now in {one}"):
        began.check(origin(), "run")
    one.unlink()
    began.check(origin(), "run")
    older = {name: value for name, value in asdict(began).items() if name != "statistics"}
    Origin(**older).check(origin(), "run")

"""The search against all mappings, one by one."""

from dataclasses import replace

import pytest
from nemo_upcycle_recipes.expectations import workload
from nemo_upcycle_recipes.numbers import LLAMA3_8B_DENSE

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.planner.hardware import Hardware
from nemo_upcycle.planner.search import Prediction, mappings_of, predict, search
from nemo_upcycle.planner.workload import Mapping
from tests.planning import H100, PAPER


@pytest.fixture(scope="module")
def found() -> list[Prediction]:
    return search(PAPER, 16, H100)


def test_the_search_finds_the_fastest_that_fits(found: list[Prediction]) -> None:
    """Against all mappings, each with every recompute, one by one."""
    every = [
        predict(PAPER, one, H100)
        for mappings in mappings_of(PAPER, 16, H100)
        for one in mappings
    ]  # fmt: skip
    fitting = [one for one in every if one.fits]
    assert 0 < len(fitting) < len(every)
    assert all(one.fits for one in found)
    assert found[0].time.total == min(one.time.total for one in fitting)
    times = [one.time.total for one in found]
    assert times == sorted(times)


def test_every_mapping_is_one_that_megatron_takes() -> None:
    seen = 0
    for mappings in mappings_of(workload(LLAMA3_8B_DENSE), 64, H100):
        for one in mappings:
            seen += 1
            folding, microbatches = one.folding, one.microbatches(512)
            assert one.world_size == 64
            assert folding.expert_model_parallel_size == 1
            assert microbatches * one.data_parallel * one.micro_batch_size == 512
            if folding.virtual_pipeline_model_parallel_size:
                assert microbatches % folding.pipeline_model_parallel_size == 0
    assert seen > 50


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UpcyclingError, match="global batch of 512 does not divide"):
        predict(PAPER, Mapping(ParallelFolding(), 24), H100)


def test_hardware_is_not_forgotten(found: list[Prediction]) -> None:
    """A memory twice as large lets mappings in that did not fit."""
    twice: Hardware = replace(H100, memory_gib=2 * H100.memory_gib)
    assert len(search(PAPER, 16, twice)) > len(found)

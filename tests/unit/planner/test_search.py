"""The search against all mappings, one by one."""

from dataclasses import replace

import pytest
from nemo_upcycle_recipes.expectations import workload
from nemo_upcycle_recipes.numbers import LLAMA3_8B_DENSE

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.planner.hardware import Hardware
from nemo_upcycle.planner.search import Prediction, predict, search
from nemo_upcycle.planner.space import Given, foldings, mappings_of, micro_batch_sizes
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


@pytest.mark.parametrize(
    ("layers", "stages"),
    [(32, {2: "PP2", 4: "PP4", 8: "PP8"}), (31, {2: "PP2+L", 4: "PP4+L", 8: "PP8+L"}),
     (30, {2: "PP2", 4: "PP4+EL", 8: "PP8+EL"}), (29, {2: "PP2+L"})],
)  # fmt: skip
def test_layers_that_do_not_divide_share_the_stages_with_embedding_and_output(
    layers: int, stages: dict[int, str]
) -> None:
    work = replace(PAPER, arch=replace(PAPER.arch, num_layers=layers))
    found = {
        one.pipeline_model_parallel_size: str(one).split()[2]
        for one in foldings(work, 64, H100)
        if 1 < one.pipeline_model_parallel_size < 16
    }
    assert found == stages


def test_given_stages_are_kept() -> None:
    """Also where other stages would be more even."""
    work = replace(PAPER, arch=replace(PAPER.arch, num_layers=30))
    first = Given({"num_layers_in_first_pipeline_stage": 9, "pipeline_model_parallel_size": 8})
    found = [str(one) for one in foldings(work, 64, H100, first)]
    assert found and all("PP8 first9" in one and "+" not in one for one in found)


@pytest.mark.parametrize(
    ("seq_length", "batch", "given", "sizes"),
    [(8192, 512, None, [1, 2, 4]), (16384, 512, None, [1, 2, 4]),
     (2048, 512, None, [1, 2, 4, 8, 16]), (2048, 6, None, [1, 2, 4]), (8192, 512, 32, [32])],
)  # fmt: skip
def test_short_sequences_have_larger_microbatches(
    seq_length: int, batch: int, given: int | None, sizes: list[int]
) -> None:
    work = replace(PAPER, seq_length=seq_length, global_batch_size=batch)
    assert micro_batch_sizes(work, Given(micro_batch_size=given)) == sizes

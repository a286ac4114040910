"""Memory and time of an optimizer that is stored in less precision, or on the host."""

from dataclasses import replace
from typing import Any

import pytest

from nemo_upcycle.config import OptimizerStorage, ParallelFolding
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.planner.memory import memory, model_state
from nemo_upcycle.planner.optimizer import held, host_bytes, passing_bytes, state_bytes
from nemo_upcycle.planner.savings import SAVINGS, with_savings
from nemo_upcycle.planner.search import HEADROOM, mappings_of, room
from nemo_upcycle.planner.step_time import step_time
from nemo_upcycle.planner.tuning import explain, tune
from nemo_upcycle.planner.workload import Mapping, Workload
from tests.planning import H100, PAPER

ONE_NODE = Mapping(ParallelFolding.of(tp=2, pp=2, ep=4, etp=1), 8, recompute="full")


def storing(**values: Any) -> Workload:
    return PAPER.storing(OptimizerStorage(**values))


@pytest.mark.parametrize(
    ("values", "state", "passing"),
    [
        ({}, 12, 0),
        ({"optimizer_state": "bf16"}, 8, 8),
        ({"optimizer_state": "fp8"}, 6, 8),
        ({"grad_reduce_in_fp32": False}, 12, 12),
        ({"optimizer_offload_fraction": 0.5}, 6, 4),
        ({"optimizer_offload_fraction": 1.0}, 0, 2),
        ({"optimizer_offload_fraction": 0.5, "grad_reduce_in_fp32": False}, 8, 4),
    ],
)
def test_bytes_per_parameter(values: dict[str, Any], state: float, passing: float) -> None:
    workload = storing(**values)
    assert state_bytes(workload) == state
    assert passing_bytes(workload) == passing


def test_what_passes_counts_only_beyond_the_activations() -> None:
    half = storing(optimizer_offload_fraction=0.5)
    used = memory(half, ONE_NODE)
    state = model_state(half, ONE_NODE, stage=0)
    assert 0 < used.passing < state.passing
    assert used.activations + used.working + used.passing == pytest.approx(state.passing)
    kept = memory(half, replace(ONE_NODE, recompute="none"))
    assert kept.activations + kept.working > state.passing
    assert kept.passing == 0


def test_offloading_moves_bytes_to_the_host() -> None:
    """All that leaves the GPU arrives at the host, with the gradients."""
    all_here = model_state(PAPER, ONE_NODE, stage=0)
    none_here = model_state(storing(optimizer_offload_fraction=1.0), ONE_NODE, stage=0)
    assert none_here[:2] == all_here[:2]
    assert none_here.optimizer == 0
    offloaded = host_bytes(storing(optimizer_offload_fraction=1.0), ONE_NODE, H100) / 8
    assert offloaded == pytest.approx(all_here.optimizer * 16 / 12, rel=0.001)


def test_time_of_the_host() -> None:
    def optimizer(workload: Workload, **hardware: float) -> float:
        return step_time(workload, ONE_NODE, replace(H100, **hardware)).optimizer

    half, whole = (storing(optimizer_offload_fraction=part) for part in (0.5, 1.0))
    on_gpu = optimizer(PAPER)
    assert optimizer(half) > 10 * on_gpu
    assert optimizer(half) - on_gpu / 2 == pytest.approx(optimizer(whole) / 2)
    # Eight GPUs share the host's memory; each has a link.
    parameters = held(PAPER, ONE_NODE)
    only_memory = optimizer(whole, host_link_bandwidth=1e9)
    assert only_memory == pytest.approx(8 * parameters * 40 / (0.5 * 614.4e9), rel=1e-3)
    only_link = optimizer(whole, host_memory_bandwidth=1e9)
    assert only_link == pytest.approx(parameters * (4 / 0.8 + 2 / 0.2) / 64e9, rel=1e-3)
    assert optimizer(PAPER, host_memory_bandwidth=1) == on_gpu


def test_gradients_in_bf16_take_half_the_memory_and_network() -> None:
    in_bf16 = storing(grad_reduce_in_fp32=False)
    (_, whole, _, _), (_, half, _, _) = (
        model_state(one, ONE_NODE, stage=0) for one in (PAPER, in_bf16)
    )
    assert whole == 2 * half
    spread = Mapping(ParallelFolding.of(pp=2), 8)
    slow = replace(H100, nvlink_bandwidth=1)
    more, less = (step_time(one, spread, slow).data_parallel for one in (PAPER, in_bf16))
    # The parameters that are gathered stay as large.
    assert more / 2 < less < more


def test_one_node_trains_with_the_optimizer_on_the_host() -> None:
    found = tune(PAPER, 8, H100, savings=SAVINGS)
    best = found.best[0]
    assert best.memory.total <= room(H100)
    assert best.workload.optimizer.optimizer_offload_fraction >= 0.75
    assert best.workload.optimizer.optimizer_state == "fp32"
    first, *_ = explain(found)
    assert first == found.saving
    for words in ("the least is 106 GiB", "of the optimizer on the CPUs", "no precision"):
        assert words in first
    assert "16 GPUs" in first
    assert "FSDP" not in found.compared


def test_savings_are_the_last_resort() -> None:
    assert tune(PAPER, 16, H100, savings=SAVINGS).best == tune(PAPER, 16, H100).best
    with pytest.raises(UpcyclingError, match="Nothing fits"):
        tune(PAPER, 8, H100, savings=[OptimizerStorage(optimizer_offload_fraction=0.25)])


def test_the_host_has_an_end() -> None:
    def fractions(gib: float) -> set[float]:
        hardware = replace(H100, host_memory_gib=gib)
        every = list(mappings_of(PAPER, 8, hardware))
        found = with_savings(PAPER, hardware, every, SAVINGS)
        return {one.workload.optimizer.optimizer_offload_fraction for one in found}

    assert fractions(2000) == {1.0}
    assert fractions(1500) == {0.75}
    assert fractions(1000) == set()


@pytest.mark.thorough
def test_precision_is_given_up_after_everything_else() -> None:
    """Nothing fits, and the host has no memory for the optimizer."""
    spread = Mapping(ParallelFolding.of(tp=2, cp=2, pp=4, ep=4, etp=1), 64)
    bf16 = storing(optimizer_state="bf16")
    whole, less = (memory(one, spread).total / 2**30 for one in (PAPER, bf16))
    assert less < whole - 1
    hardware = replace(H100, host_memory_gib=1, memory_gib=(less + whole) / 2 / HEADROOM)
    found = tune(PAPER, 64, hardware, lambda mapping: mapping == spread, savings=SAVINGS)
    assert found.best[0].workload.optimizer == bf16.optimizer
    assert found.saving is not None
    assert "8 bits of precision" in found.saving

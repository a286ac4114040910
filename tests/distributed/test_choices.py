"""Granularity, scaling, shared experts and dense layers: what step 0 computes with each."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from tests.distributed import scenarios
from tests.distributed.foldings import FOLDINGS, spread
from tests.distributed.grid import Grid
from tests.distributed.pool import RankPool
from tests.distributed.step0 import FOLDED, TOLERANCE, difference
from tests.distributed.whole import differing, whole
from tests.tiny import write_dense

G4 = {"num_moe_experts": 32, "granularity": 4, "moe_router_topk": 8}
SIGMOID = {"moe_router_score_function": "sigmoid"}
BIAS = SIGMOID | {"moe_router_enable_expert_bias": True}
EXACT: dict[str, dict[str, Any]] = {
    "E8G2T2": {"num_moe_experts": 16, "granularity": 2, "moe_router_topk": 2},
    "E8G2T4": {"num_moe_experts": 16, "granularity": 2, "moe_router_topk": 4},
    "E4G4T4": {"num_moe_experts": 16, "granularity": 4, "moe_router_topk": 4},
    "E8G4T8": G4,
    "E8G4T8, scaled as needed": G4 | {"weight_scaling": "exact"},
    "shared expert": {"moe_shared_expert": True},
    "E8G4T8, shared expert": G4 | {"moe_shared_expert": True},
    "every 2nd layer": {"moe_layer_freq": 2},
    "all but the first": {"moe_layer_freq": "skip_first=1"},
    "a list of layers": {"moe_layer_freq": "[1]+[0]*2+[1]"},
    "sigmoid": SIGMOID,
    "sigmoid, expert bias": BIAS,
    "E8G4T8, sigmoid, shared expert": G4 | SIGMOID | {"moe_shared_expert": True},
    "dense gradient": {"router_dense_gradient": True},
    "normalized logits": {"router_logit_normalization": 2.0},
    "a part shared": {"moe_shared_expert_intermediate_size": 32},
    "E8G4T8, a quarter shared": G4 | {"moe_shared_expert_intermediate_size": 0.25},
    "E8G4T8, a quarter shared, sigmoid": G4
    | SIGMOID
    | {"moe_shared_expert_intermediate_size": 0.25},
    "all together": G4 | {"moe_shared_expert": True, "moe_layer_freq": (0, 1, 0, 1)},
    "padded to capacity 4": {
        "moe_expert_capacity_factor": 4.0,
        "moe_pad_expert_input_to_capacity": True,
    },
    "softmax first, all experts": {"num_moe_experts": 2, "moe_router_pre_softmax": True},
}
INEXACT: dict[str, dict[str, Any]] = {
    "G4, paper scaling": G4 | {"weight_scaling": "paper"},
    "G4, no scaling": G4 | {"weight_scaling": "none"},
    "G4, random router": G4 | {"router_initializer": "random"},
    "G4, part of a copy": G4 | {"moe_router_topk": 6},
    "softmax first": {"moe_router_pre_softmax": True},
    "G4, softmax first": G4 | {"moe_router_pre_softmax": True},
    "shared expert, no scaling": {"moe_shared_expert": True, "weight_scaling": "none"},
    "sigmoid, one expert": SIGMOID | {"moe_router_topk": 1},
    "G4, a quarter shared, no scaling": G4
    | {"moe_shared_expert_intermediate_size": 0.25, "weight_scaling": "none"},
    "capacity 0.5": {"moe_expert_capacity_factor": 0.5},
    "noise": {"initializer": "noise"},
    "drop": {"initializer": "drop"},
    "random": {"initializer": "random"},
}
FOLDINGS_OF_EACH_KIND = [
    "EP2",
    "ETP2",
    "TP2-EP2-ETP1",
    "CP2-ETP2",
    "PP2-first1",
    "PP2-VPP2",
    "EP2-ETP2",
    "TP4-EP2-ETP2",
    "TP2-DP2-EP4-ETP1",
    "TP2-DP2-ETP4",
    "PP4",
    "PP2-ETP2",
    "PP2-CP2-EP2",
    "PP2-VPP2-TP2-EP2-ETP1",
]
"""The initializers one by one run over all of them, in `test_weights.py`."""


@pytest.mark.parametrize("name", EXACT)
def test_exact_choices(ranks: RankPool, dense: Path, name: str) -> None:
    upcycling = UpcyclingConfig(**EXACT[name])
    assert upcycling.exactness(gated=True, dense_checkpoints=1).exact or name.startswith(
        "softmax first"
    )
    assert difference(ranks, dense, 4, FOLDED, upcycling) <= TOLERANCE


@pytest.mark.parametrize("name", INEXACT)
def test_inexact_choices_say_so(ranks: RankPool, dense: Path, name: str) -> None:
    upcycling = UpcyclingConfig(**INEXACT[name])
    assert not upcycling.exactness(gated=True, dense_checkpoints=1).exact
    assert difference(ranks, dense, 1, ParallelFolding(), upcycling) > 100 * TOLERANCE


@pytest.mark.parametrize("scaling", ["exact", "paper"])
def test_cube_root_scaling_is_exact_without_a_gate(
    ranks: RankPool, tmp_path: Path, scaling: str
) -> None:
    """A squared-ReLU neuron goes with the square of up: ∛G on both makes G of it."""
    dense = write_dense(tmp_path, "nemotron")
    upcycling = UpcyclingConfig(**G4, weight_scaling=scaling)
    assert upcycling.exactness(gated=False, dense_checkpoints=1).exact
    assert difference(ranks, dense, 1, ParallelFolding(), upcycling) <= TOLERANCE


# --- The same on any mapping ---------------------------------------------------------------------

EVERYTHING = {
    **G4,
    "initializer": "hybrid(copy, drop, noise(std=0.5))",
    "moe_shared_expert": True,
    "moe_layer_freq": (1, 0, 1, 1),
}
"""Of all that decides weights, one of each."""


@pytest.fixture(scope="module")
def one_rank(ranks: RankPool, dense: Path) -> Any:
    return everything(ranks, dense, 1, ParallelFolding())


def everything(
    ranks: RankPool, dense: Path, world_size: int, folding: ParallelFolding, **change: Any
) -> Any:
    upcycling = replace(UpcyclingConfig(**EVERYTHING), **change)
    results = ranks.run(
        scenarios.weights, world_size, dense=dense, folding=folding, upcycling=upcycling
    )
    return whole(shard for result in results for shard in result)


@pytest.mark.parametrize("name", FOLDINGS_OF_EACH_KIND)
def test_weights_are_bit_identical_on_any_folding(
    ranks: RankPool, dense: Path, one_rank: Any, name: str
) -> None:
    mapping = FOLDINGS[name]
    found = everything(ranks, dense, mapping.world_size, mapping.folding)
    assert differing(found, one_rank) == []


PART = {"moe_shared_expert": False, "moe_shared_expert_intermediate_size": 0.25, **BIAS}


@pytest.fixture(scope="module")
def part_on_one_rank(ranks: RankPool, dense: Path) -> Any:
    return everything(ranks, dense, 1, ParallelFolding(), **PART)


@pytest.mark.parametrize("name", ["ETP2", "EP2-ETP2", "PP2-VPP2-TP2-EP2-ETP1"])
def test_a_part_shared_is_bit_identical_on_any_folding(
    ranks: RankPool, dense: Path, part_on_one_rank: Any, name: str
) -> None:
    mapping = FOLDINGS[name]
    found = everything(ranks, dense, mapping.world_size, mapping.folding, **PART)
    assert any(shape.endswith("router.expert_bias") for shape in found)
    assert differing(found, part_on_one_rank) == []


def test_another_seed_gives_others(ranks: RankPool, dense: Path, one_rank: Any) -> None:
    found = everything(ranks, dense, 1, ParallelFolding(), seed=7)
    changed = differing(found, one_rank)
    assert any("router" in name for name in changed)
    assert any(".experts." in name for name in changed)
    assert not any("attention" in name or "shared" in name for name in changed)


def test_what_is_trained_is_saved_and_loaded_elsewhere(
    ranks: RankPool, grid: Grid, tmp_path: Path, one_rank: Any
) -> None:
    """Dense and MoE layers in one model, from TP2 PP2 EP2 to EP4."""
    dense = grid.dense("4 layers")
    upcycling = UpcyclingConfig(**EVERYTHING)
    mapping = spread(4, tp=2, pp=2, ep=2)
    ranks.run(
        scenarios.upcycled_and_saved,
        4,
        dense=dense,
        folding=mapping.folding,
        upcycling=upcycling,
        directory=tmp_path,
    )
    results = ranks.run(
        scenarios.loaded,
        4,
        dense=dense,
        folding=spread(4, ep=4).folding,
        upcycling=upcycling,
        saved=tmp_path,
    )
    found = whole(shard for result in results for shard in result)
    assert differing(found, one_rank) == []

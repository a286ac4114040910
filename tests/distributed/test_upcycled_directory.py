"""A directory that is made without a model is the export of a run before its first step."""

from dataclasses import replace
from pathlib import Path

import pytest

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.engine.upcycled_directory import upcycle_directory
from nemo_upcycle.trained.export import export
from tests.distributed import scenarios
from tests.distributed.pool import RankPool
from tests.tiny import write_dense

E4 = UpcyclingConfig(num_moe_experts=4)
WAYS = {
    "granular, dropped": ("llama", replace(E4, granularity=2, initializer="drop(ratio=0.3)")),
    "softmax first, scaled": ("llama", replace(E4, moe_router_pre_softmax=True, granularity=2)),
    "shared expert, noise": ("qwen2", replace(E4, moe_shared_expert=True, initializer="noise")),
    "sigmoid": ("llama", replace(E4, moe_router_score_function="sigmoid")),
    "sigmoid, expert bias, part shared": (
        "qwen2",
        replace(
            E4,
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            moe_shared_expert_intermediate_size=0.5,
        ),
    ),
    "every other layer": ("qwen2, tied", replace(E4, moe_layer_freq=2)),
    "stacked experts": (
        "granite",
        replace(E4, granularity=2, moe_shared_expert=True, router_initializer="virtual_groups"),
    ),
    "norms of queries": ("qwen3", replace(E4, router_initializer="random", seed=7)),
}


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_those_of_an_export(ranks: RankPool, tmp_path: Path, way: str) -> None:
    family, upcycling = WAYS[way]
    dense = write_dense(tmp_path / "dense", family)
    ranks.run(
        scenarios.upcycled_and_saved_as_nemo,
        1,
        dense=dense,
        folding=ParallelFolding(),
        upcycling=upcycling,
        directory=tmp_path / "run",
    )
    export(tmp_path / "run", tmp_path / "exported")
    upcycle_directory(str(dense), tmp_path / "direct", upcycling)
    found, expected = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("direct", "exported")
    )
    assert found == expected

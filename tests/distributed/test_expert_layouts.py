"""Experts in one weight each or all in one: the same weights as sequential experts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.trained.export import export
from tests.distributed import scenarios, te_layout
from tests.distributed.pool import RankPool
from tests.distributed.whole import differing, whole

UPCYCLING = UpcyclingConfig()
FOLDINGS = {
    "1": (1, ParallelFolding()),
    "EP2": (2, ParallelFolding(expert_model_parallel_size=2)),
    "ETP2": (2, ParallelFolding(expert_tensor_parallel_size=2)),
}
FOLDED = ParallelFolding(
    tensor_model_parallel_size=2,
    pipeline_model_parallel_size=2,
    expert_tensor_parallel_size=2,
)


def upcycled_experts(dense: Path, folding: ParallelFolding, layout: str) -> Any:
    """Upcycle a model whose experts are of the layout; return this rank's shards."""
    from nemo_upcycle.engine.owned_shards import owned_shards

    spec = {"sequential": None, "legacy": _legacy_spec, "te": _te_spec}[layout]
    overrides: dict[str, Any] = {"transformer_layer_spec": spec} if spec else {}
    chunks = scenarios.upcycled(dense, folding, UPCYCLING, **overrides)
    names = [name for chunk in chunks for name, _ in chunk.named_parameters()]
    return names, [(o.shard, o.data.clone()) for chunk in chunks for o in owned_shards(chunk)]


def save_experts(dense: Path, folding: ParallelFolding, layout: str, directory: Path) -> None:
    """Upcycle a model whose experts are of the layout and save it as NeMo 2 does."""
    spec = {"sequential": None, "legacy": _legacy_spec, "te": _te_spec}[layout]
    overrides: dict[str, Any] = {"transformer_layer_spec": spec} if spec else {}
    chunks = scenarios.upcycled(dense, folding, UpcyclingConfig(initializer="noise"), **overrides)
    scenarios._save_as_nemo(chunks, directory)


def _legacy_spec(config: Any, vp_stage: int | None = None) -> Any:
    from megatron.core.transformer.moe import grouped_gemm_util
    from megatron.core.transformer.moe.experts import GroupedMLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    # The kernels need CUDA; the weights, which this is about, do not.
    grouped_gemm_util.grouped_gemm = object()
    return _with_experts(config, vp_stage, ModuleSpec(module=GroupedMLP))


def _te_spec(config: Any, vp_stage: int | None = None) -> Any:
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelGroupedLinear,
        TERowParallelGroupedLinear,
    )
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import TEGroupedMLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    linears = MLPSubmodules(
        linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear
    )
    return _with_experts(config, vp_stage, ModuleSpec(module=TEGroupedMLP, submodules=linears))


def _with_experts(config: Any, vp_stage: int | None, experts: Any) -> Any:
    from nemo_upcycle.engine import cpu

    block = cpu.cpu_layer_spec(config, vp_stage)
    for layer in block.layer_specs:
        layer.submodules.mlp.submodules.experts = experts
    return block


@pytest.fixture(scope="module")
def one_rank(ranks: RankPool, dense: Path) -> dict[str, torch.Tensor]:
    ((_, shards),) = ranks.run(
        upcycled_experts, 1, dense=dense, folding=ParallelFolding(), layout="sequential"
    )
    return whole(shards)


@pytest.fixture(scope="module")
def te_ranks() -> Iterator[RankPool]:
    """Processes that take the stand-in for Transformer Engine."""
    pool = RankPool(size=2, prepare=te_layout.install)
    yield pool
    pool.stop()


def check(results: list[Any], parameter: str, one_rank: dict[str, torch.Tensor]) -> None:
    names, shards = zip(*results, strict=True)
    assert any(name.endswith(parameter) for name in names[0])
    parameters = whole([shard for of_rank in shards for shard in of_rank])
    assert parameters.keys() == one_rank.keys()
    assert not [key for key in parameters if not torch.equal(parameters[key], one_rank[key])]


@pytest.mark.parametrize("folding", [*FOLDINGS.values(), (4, FOLDED)], ids=[*FOLDINGS, "4"])
def test_legacy_grouped_experts(
    ranks: RankPool,
    dense: Path,
    one_rank: dict[str, torch.Tensor],
    folding: tuple[int, ParallelFolding],
) -> None:
    world_size, spread = folding
    results = ranks.run(upcycled_experts, world_size, dense=dense, folding=spread, layout="legacy")
    check(results, "mlp.experts.weight1", one_rank)


@pytest.mark.thorough
@pytest.mark.parametrize("folding", FOLDINGS.values(), ids=FOLDINGS)
def test_transformer_engine_grouped_experts(
    te_ranks: RankPool,
    dense: Path,
    one_rank: dict[str, torch.Tensor],
    folding: tuple[int, ParallelFolding],
) -> None:
    world_size, spread = folding
    results = te_ranks.run(upcycled_experts, world_size, dense=dense, folding=spread, layout="te")
    check(results, "mlp.experts.linear_fc1.weight0", one_rank)


@pytest.mark.thorough
@pytest.mark.parametrize("layout", [pytest.param("legacy", marks=pytest.mark.slow), "te"])
def test_exports_of_all_layouts_are_the_same(
    ranks: RankPool, te_ranks: RankPool, dense: Path, tmp_path: Path, layout: str
) -> None:
    """Also back: what was exported fills grouped experts."""
    sequential = {"dense": dense, "folding": ParallelFolding(), "layout": "sequential"}
    ranks.run(save_experts, 1, **sequential, directory=tmp_path / "sequential")
    pool = te_ranks if layout == "te" else ranks
    for name, (world_size, folding) in FOLDINGS.items():
        options = {"dense": dense, "folding": folding, "layout": layout}
        pool.run(save_experts, world_size, **options, directory=tmp_path / name)
    for name in ("sequential", *FOLDINGS):
        export(tmp_path / name, tmp_path / f"{name}-hf")
    files = [tmp_path / f"{name}-hf" / "model.safetensors" for name in ("sequential", *FOLDINGS)]
    assert len({file.read_bytes() for file in files}) == 1
    expected = ranks.run(restored, 1, source=files[0].parent, layout="sequential", **EP1)
    for source in (files[0].parent, tmp_path / "EP2"):
        found = pool.run(restored, 2, source=source, layout=layout, **EP2)
        assert not differing(
            whole(shard for shards in found for shard in shards),
            whole(shard for shards in expected for shard in shards),
        )


EP1: dict[str, Any] = {"folding": ParallelFolding()}
EP2: dict[str, Any] = {"folding": ParallelFolding(expert_model_parallel_size=2)}


def restored(source: Path, folding: ParallelFolding, layout: str) -> Any:
    """Build a model whose experts are of the layout, fill it from a trained one."""
    from nemo_upcycle.engine import load
    from nemo_upcycle.trained.opened import open_trained

    trained = open_trained(source)
    spec = {"sequential": None, "legacy": _legacy_spec, "te": _te_spec}[layout]
    overrides: dict[str, Any] = {"transformer_layer_spec": spec} if spec else {}
    chunks = scenarios.build_from(trained.model.arch, folding, UPCYCLING, **overrides)
    load.restore(chunks, trained)
    return scenarios.shards(chunks)

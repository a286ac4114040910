"""On a GPU, with Transformer Engine's layers over nccl: the same weights, the same function."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
"""Of the largest logit; Transformer Engine multiplies fp32 matrices in TF32."""


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The benchmark's way to build models, in a process group of one rank."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from benchmarks import gpu

    gpu.start(str(tmp_path_factory.mktemp("store")))
    yield gpu
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["grouped", "sequential"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_step0_is_the_dense_models(gpu: Any, dense: Path, precision: str, kind: str) -> None:
    import torch

    dtype = getattr(torch, precision)
    ids = gpu.tokens(2, 64)
    expected = gpu.filled_logits(dense, gpu.DENSE, dtype, ids)
    found = gpu.filled_logits(dense, gpu.E8T2, dtype, ids, **gpu.EXPERTS[kind])
    tolerance = TOLERANCE[precision] * float(expected.abs().max())
    assert float((found - expected).abs().max()) < tolerance


def test_experts_in_one_gemm_get_the_weights_of_experts_in_turn(gpu: Any, dense: Path) -> None:
    import torch

    from nemo_upcycle.engine.owned_shards import owned_shards

    weights = []
    for kind in ("grouped", "sequential"):
        owned = owned_shards(gpu.filled(dense, gpu.E8T2, torch.float32, **gpu.EXPERTS[kind]))
        weights.append({(own.shard.name, own.shard.offset): own.data for own in owned})
    grouped, sequential = weights
    assert grouped.keys() == sequential.keys()
    assert all(torch.equal(grouped[place], sequential[place]) for place in grouped)


def test_the_check_above_can_fail(gpu: Any, dense: Path) -> None:
    """A broken expert is seen in the logits."""
    import torch

    ids = gpu.tokens(2, 64)
    model = gpu.filled(dense, gpu.E8T2, torch.float32, **gpu.EXPERTS["grouped"])
    with torch.no_grad():
        expected = model(**gpu.inputs(ids)).float()
        for parameter in model.decoder.layers[1].mlp.experts.parameters():
            parameter.zero_()
            break
        found = model(**gpu.inputs(ids)).float()
    assert float((found - expected).abs().max()) > TOLERANCE["float32"] * float(
        expected.abs().max()
    )

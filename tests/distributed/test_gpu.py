"""On a GPU, with Transformer Engine's layers over nccl: the same weights, the same function.

What is about FP8, fused gradients and resuming has not been run on a GPU yet.
"""

import sys
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


@pytest.mark.parametrize("kind", ["grouped", "sequential"])
def test_step0_in_fp8_is_the_dense_models_but_for_fp8s_rounding(
    gpu: Any, dense: Path, kind: str
) -> None:
    """The MoE in FP8 is as far from the dense model in bf16 as the dense model in FP8 is."""
    import torch

    from nemo_upcycle.config import PRECISIONS

    ids = gpu.tokens(2, 64)
    fp8 = PRECISIONS["fp8"].fields
    expected = gpu.filled_logits(dense, gpu.DENSE, torch.bfloat16, ids)
    rounded = gpu.filled_logits(dense, gpu.DENSE, torch.bfloat16, ids, **fp8)
    padded = {**fp8, "moe_router_padding_for_fp8": True}
    found = gpu.filled_logits(dense, gpu.E8T2, torch.bfloat16, ids, **padded, **gpu.EXPERTS[kind])
    apart = float((rounded - expected).abs().max())
    assert apart > 0  # otherwise nothing was in FP8
    tolerance = TOLERANCE["bfloat16"] * float(expected.abs().max()) + 2 * apart
    assert float((found - expected).abs().max()) < tolerance


@pytest.mark.parametrize("kind", ["grouped", "sequential"])
def test_experts_are_in_the_gradient_norm_of_all_ranks(gpu: Any, dense: Path, kind: str) -> None:
    """Megatron omits parameters without `tensor_model_parallel` on all but the first rank."""
    import torch

    model = gpu.filled(dense, gpu.E8T2, torch.bfloat16, **gpu.EXPERTS[kind])
    experts = {n: p for n, p in model.named_parameters() if ".mlp.experts." in n}
    assert len(experts) >= 2 * len(model.decoder.layers)
    assert all(parameter.tensor_model_parallel for parameter in experts.values())


def test_fused_weight_gradients_are_the_added_ones(gpu: Any, dense: Path) -> None:
    from benchmarks.gpu_training import Case, Training, free

    losses = []
    for fused in (False, True):
        training = Training(Case(fused=fused), small=True)
        losses.append([training.step() for _ in range(4)])
        training.close()
        free()
    added, fused_losses = losses
    assert fused_losses[0] == pytest.approx(added[0], rel=1e-3)
    assert fused_losses[-1] == pytest.approx(added[-1], rel=0.02)
    assert fused_losses[-1] < fused_losses[0]


def test_the_recipe_trains_saves_and_resumes(tmp_path: Path) -> None:
    """In processes of their own, as a user starts them; the second goes on from the first."""
    import torch

    from nemo_upcycle.evaluation.events import event_files, read_scalars
    from tests.end_to_end import cli
    from tests.workspace import make_workspace

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    make_workspace(tmp_path / "demo")
    for steps in (4, 6):
        factory = f"llama_tiny_e8t2(max_steps={steps}, accelerator='gpu', precision='bf16-mixed')"
        # Without the `nemo` script, which a bare GPU machine may lack.
        start = "from nemo_run.__main__ import app; app()"
        words = ("llm", "pretrain", "--factory", factory, "--yes")
        output = cli.run_script(tmp_path, sys.executable, "-c", start, *words)
        losses = read_scalars(event_files(tmp_path / "demo" / "e8t2"))["reduced_train_loss"]
        assert sorted(losses) == list(range(steps)), output[-3000:]
    assert losses[5] < losses[0]


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

"""Operations are those that torch counts of Megatron's real models, forward and backward."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.families.fields import megatron_model
from nemo_upcycle.families.model import MoEModel, upcycled_model
from nemo_upcycle.planner.flops import flops
from tests.distributed import scenarios
from tests.distributed.pool import RankPool, nemo_recipe
from tests.tiny import tokens, write_dense
from tests.workspace import make_workspace

LENGTH = 64
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama", {"num_moe_experts": None}),
    "E8T2": ("llama", {}),
    "E4G4T4": ("llama", {"num_moe_experts": 16, "granularity": 4, "moe_router_topk": 4}),
    "partly dense": ("llama", {"moe_layer_freq": (0, 1, 1, 0)}),
    "shared expert": ("llama", {"moe_shared_expert": True}),
    "part shared": ("llama", {"moe_shared_expert_intermediate_size": 0.25}),
    "no gate": ("nemotron", {}),
    "biases, tied": ("qwen2, tied", {}),
}


def counted(dense: Path, upcycling: UpcyclingConfig) -> tuple[int, MoEModel]:
    """Return what torch counts of a step on one sequence, and the model."""
    from megatron.core.utils import get_model_config
    from torch.utils.flop_counter import FlopCounterMode

    (model,) = scenarios.upcycled(dense, ParallelFolding(), upcycling)
    ids = tokens(rows=1, length=LENGTH)
    with FlopCounterMode(display=False) as counter:
        positions = torch.arange(LENGTH)[None]
        model(ids, positions, attention_mask=None, labels=ids).sum().backward()
    return counter.get_total_flops(), megatron_model(vars(get_model_config(model)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_what_torch_counts(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    """But for the router, which is not counted, and attention, which the CPU computes wholly."""
    family, upcycling = KINDS[kind]
    dense = write_dense(tmp_path, family)
    ((found, model),) = ranks.run(counted, 1, dense=dense, upcycling=UpcyclingConfig(**upcycling))
    router = 3 * 2 * model.arch.hidden_size * model.num_experts * LENGTH * sum(model.is_moe)
    assert found - router == flops(model, LENGTH).training_full_attention


@nemo_recipe
def logged(directory: Path) -> dict[str, float]:
    """Train three steps; return what the callback has logged of the last."""
    import fiddle
    from nemo_upcycle_recipes import llama_tiny

    from nemo_upcycle.nemo.mfu import MFUCallback

    recipe = llama_tiny.upcycled_recipe(dir=str(directory), name="mfu", max_steps=3)
    recipe.log.ckpt = None
    recipe.trainer.limit_val_batches = 0
    run = fiddle.build(recipe)
    trainer = run.keywords["trainer"]
    trainer.callbacks.append(MFUCallback(peak_tflops=0.5))
    run()
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_a_run_logs_its_utilization(ranks: RankPool, tmp_path: Path) -> None:
    from nemo_upcycle_recipes.numbers import LLAMA_TINY_E8T2

    workspace = make_workspace(tmp_path)
    found = ranks.run(logged, 2, directory=workspace)[0]
    assert 0 < found["tflops_per_gpu"] < 1
    assert found["mfu"] == pytest.approx(found["tflops_per_gpu"] / 0.5)
    arch = LLAMA_TINY_E8T2.architecture_of(str(workspace / "dense_hf"))
    expected = flops(
        upcycled_model(arch, LLAMA_TINY_E8T2.upcycling), LLAMA_TINY_E8T2.schedule.seq_length
    )
    ratio = expected.training_full_attention / expected.training
    assert found["mfu_full_attention"] / found["mfu"] == pytest.approx(ratio)


def test_utilization_of_the_papers_speed() -> None:
    """462.8 TFLOP/s per GPU in its convention are 46.8% of an H100 (arXiv 2412.09952, Table 2)."""
    from nemo_upcycle_recipes.numbers import LLAMA3_8B_E8T2

    from nemo_upcycle.planner.flops import utilization
    from nemo_upcycle.planner.hardware import device_peak_tflops

    counted = flops(upcycled_model(LLAMA3_8B_E8T2.architecture, LLAMA3_8B_E8T2.upcycling), 8192)
    seconds = 512 * counted.training_full_attention / (128 * 462.8e12)
    found = utilization(counted, 512, seconds, 128, device_peak_tflops("NVIDIA H100 80GB HBM3"))
    assert found["mfu_full_attention"] == pytest.approx(0.468, abs=5e-4)
    assert found["mfu"] == pytest.approx(0.468 * 6.987 / 7.515, abs=5e-4)

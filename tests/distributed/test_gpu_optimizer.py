"""On a GPU: bytes of Transformer Engine's Adam with moments below fp32. Not run yet."""

from typing import Any

import pytest

from nemo_upcycle.config import OptimizerStorage
from nemo_upcycle.planner.optimizer import passing_bytes, state_bytes
from tests.planning import PAPER

pytestmark = pytest.mark.gpu

PARAMETERS = 2**24


@pytest.fixture(scope="module")
def cuda() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.cuda


@pytest.mark.parametrize("optimizer_state", ["bf16", "fp8"])
def test_bytes_of_adams_state_are_those_predicted(cuda: Any, optimizer_state: str) -> None:
    import torch
    from transformer_engine.pytorch.optimizers import FusedAdam

    workload = PAPER.storing(OptimizerStorage(optimizer_state=optimizer_state))
    moments = {"bf16": torch.bfloat16, "fp8": torch.uint8}[optimizer_state]
    parameter = torch.nn.Parameter(
        torch.zeros(PARAMETERS, dtype=torch.bfloat16, device="cuda"), requires_grad=True
    )
    parameter.decoupled_grad = torch.zeros(PARAMETERS, device="cuda")
    without = cuda.memory_allocated()
    adam = FusedAdam(
        [parameter],
        master_weights=True,
        use_decoupled_grad=True,
        exp_avg_dtype=moments,
        exp_avg_sq_dtype=moments,
    )
    adam.step()
    cuda.synchronize()
    between = cuda.memory_allocated()
    assert between - without == pytest.approx(state_bytes(workload) * PARAMETERS, rel=0.01)
    cuda.reset_peak_memory_stats()
    adam.step()
    cuda.synchronize()
    passing = cuda.max_memory_allocated() - between
    assert passing <= 1.05 * passing_bytes(workload) * PARAMETERS

"""CPU mode touches nothing that did not ask for it."""

import subprocess
import sys

import pytest

SNAPSHOT = """
import os, sys, traceback
import torch, megatron.core.optimizer.distrib_optimizer as distrib
import megatron.core.tensor_parallel.random as rng
import megatron.core.transformer.moe.token_dispatcher as dispatcher
import nemo.collections.llm, nemo.lightning.io.pl as pl, nemo_run

places = [torch, torch.cuda, torch.Tensor, torch.distributed, rng, dispatcher, pl,
          distrib.DistributedOptimizer]
def state():
    modes = torch.overrides._get_current_function_mode_stack()
    return [dict(vars(place)) for place in places], list(modes)
torch.cuda.is_available = lambda: True  # a machine with CUDA, as far as the package can tell
torch.set_num_threads(1)  # threads of OpenMP would not survive a fork
"""

IN_A_FORK = """
if (child := os.fork()) == 0:
    try:
        exec({script!r})
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, {script!r}
"""

IMPORTS = """
before = state()
import nemo_upcycle.nemo.cpu, nemo_upcycle.nemo.model, nemo_upcycle.nemo.callback
import nemo_upcycle.nemo.strategy
import nemo_upcycle.cli.nemo_run
assert state() == before, "the import changed torch, Megatron or NeMo"
from nemo_upcycle_recipes.llama_tiny import upcycled_recipe
recipe = upcycled_recipe()
assert recipe.trainer.accelerator == "gpu", recipe.trainer.accelerator
for ask in (nemo_upcycle.nemo.cpu.enable, nemo_upcycle.nemo.cpu.CpuMegatronStrategy):
    try:
        ask()
    except nemo_upcycle.errors.UpcyclingError as error:
        assert "CUDA device" in str(error)
    else:
        raise AssertionError("CPU mode was switched on beside a CUDA device")
assert state() == before, "a refused CPU mode changed torch, Megatron or NeMo"
print("UNCHANGED")
"""

ENABLED = """
import nemo_upcycle.nemo.cpu
torch.cuda.is_available = lambda: False
before = state()
nemo_upcycle.nemo.cpu.enable()
print("CHANGED" if state() != before else "same")
assert torch.zeros(2, device="cuda").device.type == "cpu"
"""

LAYERS = """
import fiddle
torch.cuda.is_available = lambda: False
from megatron.core import parallel_state
from nemo_upcycle_recipes.llama_tiny import dense_recipe
alone = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
torch.distributed.init_process_group("gloo", **alone)
parallel_state.initialize_model_parallel()
config = fiddle.build(dense_recipe(accelerator="cpu").model.config)
config.transformer_layer_spec(config)
assert pl._fix_tensors_device({}) == {}  # NeMo's own asserts that there is a GPU
print("PREPARED")
"""


def run(script: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def printed() -> str:
    """What the scripts print, each in a fork of a process that has imported NeMo alone."""
    forks = (IN_A_FORK.format(script=script) for script in (IMPORTS, ENABLED, LAYERS))
    return run(SNAPSHOT + "".join(forks))


def test_importing_changes_nothing_in_torch_and_a_cuda_machine_refuses_cpu_mode(
    printed: str,
) -> None:
    assert "UNCHANGED" in printed


def test_the_check_above_can_fail(printed: str) -> None:
    assert "\nCHANGED" in printed


def test_a_recipes_layers_prepare_nemo_for_its_own_exporters(printed: str) -> None:
    """NeMo's exporters make a model without the strategy that prepares NeMo elsewhere."""
    assert "PREPARED" in printed


@pytest.mark.gpu
def test_importing_on_a_real_cuda_machine() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    own = SNAPSHOT.replace("torch.cuda.is_available = lambda: True", "torch.cuda.init()")
    script = "before = state()\nimport nemo_upcycle.cli.nemo_run\nassert state() == before\n"
    assert "UNCHANGED" in run(own + script + "print('UNCHANGED')")

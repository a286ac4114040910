"""Run the real NeMo and Lightning on CPU and gloo, with the engine's Megatron-Core patches.

Importing this module changes nothing. A recipe selects CPU with `CpuMegatronStrategy`, whose
constructor patches the process.
"""

import os
from functools import wraps
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from nemo import lightning as nl
from nemo.lightning import io

from nemo_upcycle.engine.cpu import layers, patches
from nemo_upcycle.nemo.strategy import MegatronStrategy


class GlooAccelerator(CPUAccelerator, io.IOMixin):
    """CPU ranks, as many as the launcher starts on this node."""

    @staticmethod
    def auto_device_count() -> int:
        """Return the number of ranks that torchrun started on this node; 1 without a launcher."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class CpuMegatronStrategy(MegatronStrategy):
    """NeMo's Megatron strategy over gloo."""

    @wraps(MegatronStrategy.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        enable()
        super().__init__(*args, **kwargs)

    @property
    def is_alone(self) -> bool:
        """Whether there is only one rank, as in a notebook."""
        return self.cluster_environment.world_size() == 1

    def _configure_launcher(self) -> None:
        # Lightning refuses to launch processes from a notebook; a single rank launches none.
        if not self.is_alone:
            super()._configure_launcher()

    def setup_distributed(self) -> None:
        if self.is_alone:
            # A store without a port. A port would stay open and in the environment; a command
            # started from the notebook would then fail because the port is in use.
            self.store = torch.distributed.HashStore()
        super().setup_distributed()
        # NeMo seeds Megatron's RNG tracker only if there is a GPU.
        seed = int(os.environ.get("PL_GLOBAL_SEED", "1234"))
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def trainer(**strategy: Any) -> nl.Trainer:
    """Make a trainer with one rank on CPU.

    Args:
        strategy: Arguments of NeMo's Megatron strategy.
    """
    return nl.Trainer(
        devices=1, accelerator=GlooAccelerator(), strategy=CpuMegatronStrategy(**strategy)
    )


def enable() -> None:
    """Patch this process to run NeMo and Megatron on CPU; idempotent.

    Raises:
        UpcyclingError: There is a CUDA device.
    """
    patches.enable()
    import nemo.lightning.io.pl as nemo_io

    nemo_io._fix_tensors_device = lambda checkpoint: checkpoint  # asserts CUDA on a resume


def cpu_layer_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Build the layers of one pipeline stage for a CPU; see `engine.cpu.cpu_layer_spec`.

    NeMo's own importers and exporters make a model without `CpuMegatronStrategy`. Of this package
    they call only the layer spec, which therefore prepares NeMo too.
    """
    enable()
    return layers.cpu_layer_spec(config, vp_stage)

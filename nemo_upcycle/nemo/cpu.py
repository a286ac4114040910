"""Run the real NeMo and Lightning on CPU and gloo, over the engine's Megatron-Core.

Importing this changes nothing. A recipe asks for CPU by naming `CpuMegatronStrategy`, whose making
changes its process.
"""

import os
from functools import wraps
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from megatron.core import tensor_parallel
from nemo import lightning as nl
from nemo.lightning import io

from nemo_upcycle.engine.cpu import patches
from nemo_upcycle.nemo.strategy import MegatronStrategy


class GlooAccelerator(CPUAccelerator, io.IOMixin):
    """CPU ranks, as many as the launcher starts on this node."""

    @staticmethod
    def auto_device_count() -> int:
        """Return the ranks that torchrun started here, 1 without a launcher."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class CpuMegatronStrategy(MegatronStrategy):
    """NeMo's Megatron strategy over gloo."""

    @wraps(MegatronStrategy.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        enable()
        super().__init__(*args, **kwargs)

    @property
    def is_alone(self) -> bool:
        """Whether there is one rank in all, as in a notebook."""
        return self.cluster_environment.world_size() == 1

    def _configure_launcher(self) -> None:
        # Lightning refuses to launch processes from a notebook; one rank has none to launch.
        if not self.is_alone:
            super()._configure_launcher()

    def setup_distributed(self) -> None:
        if self.is_alone:
            # Without a port: it would stay open and in the environment, and a command that a
            # notebook starts would find it in use.
            self.store = torch.distributed.HashStore()
        super().setup_distributed()
        # NeMo seeds Megatron's RNG tracker only where there is a GPU.
        seed = int(os.environ.get("PL_GLOBAL_SEED", "1234"))
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def trainer(**strategy: Any) -> nl.Trainer:
    """Make a trainer of one rank on CPU.

    Args:
        strategy: Arguments of NeMo's Megatron strategy.
    """
    return nl.Trainer(
        devices=1, accelerator=GlooAccelerator(), strategy=CpuMegatronStrategy(**strategy)
    )


def enable() -> None:
    """Make this process run NeMo and Megatron on CPU. Calling it again does nothing.

    Raises:
        UpcyclingError: There is a CUDA device.
    """
    patches.enable()
    import nemo.lightning.io.pl as nemo_io

    nemo_io._fix_tensors_device = lambda checkpoint: checkpoint  # asserts CUDA on a resume

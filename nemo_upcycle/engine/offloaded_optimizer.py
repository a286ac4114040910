"""Megatron's optimizer with state on the host: threads to update the state, and checkpoints."""

import os
from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

_CLASSES = ("cpu_optimizer_cls", "gpu_optimizer_cls")


def prepare_offloaded(optimizer: Any, ranks_of_node: int) -> None:
    """Give each rank its share of the cores, and make checkpoints loadable.

    torchrun gives each rank one thread, with which Adam on the CPUs takes many times as long.
    Megatron-Core 0.15.3 writes the classes of the optimizers into every checkpoint, where torch
    refuses to load them.

    Args:
        optimizer: Megatron's optimizer of this rank, before a checkpoint is saved or loaded.
            Optimizers on the GPU are left as they are.
        ranks_of_node: Ranks on this node.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            for group in part.optimizer.param_groups:
                for name in _CLASSES:
                    group.pop(name, None)
            torch.set_num_threads(max(_share_of_cores(ranks_of_node), torch.get_num_threads()))


def _share_of_cores(ranks: int) -> int:
    every = os.cpu_count() or 1
    mine = len(os.sched_getaffinity(0))
    # Slurm may have bound this rank to its share.
    return mine if mine < every else max(1, every // ranks)

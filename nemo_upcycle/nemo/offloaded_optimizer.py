"""Prepare an optimizer whose state is on the host."""

import lightning.pytorch as pl
from nemo.lightning import io

from nemo_upcycle.engine.offloaded_optimizer import prepare_offloaded


class OffloadedOptimizer(pl.Callback, io.IOMixin):
    """Prepare Megatron's offloaded optimizers; see `prepare_offloaded`.

    Must come before the callbacks that record the optimizer's settings.
    """

    def __init__(self) -> None:
        """NeMo records the arguments of a constructor, and needs one to do so."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepare the optimizers, before a checkpoint is loaded."""
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, "mcore_optimizer"):
                prepare_offloaded(optimizer.mcore_optimizer, trainer.num_devices)

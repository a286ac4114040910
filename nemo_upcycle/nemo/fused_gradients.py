"""Fused weight gradients in a run of NeMo."""

import lightning.pytorch as pl
from nemo.lightning import io

from nemo_upcycle.engine.fused_gradients import fuse_weight_gradients


class FusedWeightGradients(pl.Callback, io.IOMixin):
    """Let Transformer Engine accumulate weight gradients; see `fuse_weight_gradients`.

    Does nothing on CPU, whose layers are not Transformer Engine's.
    """

    def __init__(self) -> None:
        """NeMo records the arguments of a constructor, and needs one to do so."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fuse, once Megatron's DDP has made the buffers."""
        fuse_weight_gradients(trainer.strategy.megatron_parallel)

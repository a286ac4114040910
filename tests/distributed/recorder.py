"""A Lightning callback that keeps what a test wants to know of a run."""

from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning import io
from nemo.utils.model_utils import unwrap_model

from nemo_upcycle.engine.owned_shards import owned_shards


class Recorder(pl.Callback, io.IOMixin):
    """Keeps the losses, and this rank's shards at the end."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.shards: list[tuple[Any, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["reduced_train_loss"]))

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        for chunk in trainer.strategy.megatron_parallel:
            for own in owned_shards(unwrap_model(chunk.module)):
                self.shards.append((own.shard, own.data.clone()))

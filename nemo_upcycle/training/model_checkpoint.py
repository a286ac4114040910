"""NeMo's checkpoint callback without a way to lose the last steps."""

from typing import Any

import lightning.pytorch as pl
from nemo import lightning as nl


class ModelCheckpoint(nl.ModelCheckpoint):
    """NeMo's callback, which saves the last step however the run's intervals fall.

    NeMo saves at the end of training only if the last step is no multiple of
    `val_check_interval`, taking it for granted that a validation has saved otherwise.
    """

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        super().on_train_end(trainer, pl_module)
        if self.save_last and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

"""Model-FLOPs utilization, logged at every step."""

from typing import Any

import lightning.pytorch as pl

from nemo_upcycle.nemo.recorded import Recorded
from nemo_upcycle.planner.flops import flops_of_config
from nemo_upcycle.planner.step_clock import StepClock


class MFUCallback(pl.Callback, Recorded):
    """Log TFLOP/s per GPU and model-FLOPs utilization.

    `tflops_per_gpu` and `mfu` count attention as causal. `mfu_full_attention` follows the
    convention of arXiv 2412.09952 and is larger. NeMo's own callback assumes Mixtral's vocabulary
    for every MoE.

    Args:
        peak_tflops: Peak of a GPU in the training's precision, in TFLOP/s; None looks up the
            device. If the device is unknown, utilization is not logged.
        warm_up_steps: Initial steps that are not logged, because kernels are chosen and memory is
            allocated.
    """

    def __init__(self, peak_tflops: float | None = None, warm_up_steps: int = 1) -> None:
        self.peak_tflops = peak_tflops
        self.warm_up_steps = warm_up_steps
        self._clock: StepClock | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the operations per sequence."""
        config = pl_module.config
        counted = flops_of_config(config)
        self._clock = StepClock(counted, self.peak_tflops, self.warm_up_steps)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Log the utilization of the step that ends here, timed from the end of the previous step.

        The first step after a validation or a checkpoint is not logged: the time in between is not
        training.
        """
        if self._clock is None:
            return
        sequences = trainer.datamodule.global_batch_size
        for name, value in self._clock.step_ended(sequences, trainer.world_size).items():
            pl_module.log(name, value, batch_size=1)

    def on_validation_start(self, *_: Any) -> None:
        """Forget when the last step ended."""
        self._forget()

    def on_save_checkpoint(self, *_: Any) -> None:
        """Forget when the last step ended."""
        self._forget()

    def _forget(self) -> None:
        if self._clock is not None:
            self._clock.forget()

"""Model-FLOPs utilisation, logged at every step."""

import time
from typing import Any

import lightning.pytorch as pl
import torch

from nemo_upcycle.families.fields import megatron_model
from nemo_upcycle.nemo.recorded import Recorded
from nemo_upcycle.planner.flops import Flops, flops, utilisation
from nemo_upcycle.planner.hardware import device_peak_tflops


def peak_tflops() -> float | None:
    """Return this device's peak in bf16, in TFLOP/s; None if unknown."""
    return device_peak_tflops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


class MFUCallback(pl.Callback, Recorded):
    """Log TFLOP/s per GPU and model-FLOPs utilisation.

    `tflops_per_gpu` and `mfu` count attention as causal. `mfu_full_attention` follows the
    convention of arXiv 2412.09952 and is larger. NeMo's own callback assumes Mixtral's vocabulary
    for every MoE.

    Args:
        peak_tflops: Peak of a GPU in the training's precision, in TFLOP/s; None looks up the
            device. If the device is unknown, utilisation is not logged.
        warm_up_steps: Initial steps that are not logged, because kernels are chosen and memory is
            allocated.
    """

    def __init__(self, peak_tflops: float | None = None, warm_up_steps: int = 1) -> None:
        self.peak_tflops = peak_tflops
        self.warm_up_steps = warm_up_steps
        self._flops: Flops | None = None
        self._ended: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the operations per sequence."""
        config = pl_module.config
        self._flops = flops(megatron_model(vars(config)), config.seq_length)
        self._peak = self.peak_tflops or peak_tflops()
        self._ended = None
        self._left = self.warm_up_steps

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Log the utilisation of the step that ends here, timed from the end of the previous step.

        The first step after a validation or a checkpoint is not logged: the time in between is not
        training.
        """
        now, started = time.perf_counter(), self._ended
        self._ended = now
        self._left -= 1
        if started is None or self._flops is None or self._left >= 0:
            return
        values = utilisation(
            self._flops,
            sequences=trainer.datamodule.global_batch_size,
            seconds=now - started,
            gpus=trainer.world_size,
            peak_tflops=self._peak,
        )
        for name, value in values.items():
            pl_module.log(name, value, batch_size=1)

    def on_validation_start(self, *_: Any) -> None:
        """Forget when the last step ended."""
        self._ended = None

    def on_save_checkpoint(self, *_: Any) -> None:
        """Forget when the last step ended."""
        self._ended = None

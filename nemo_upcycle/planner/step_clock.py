"""Model-FLOPs utilization of training steps, timed from end to end."""

import time

from nemo_upcycle.planner.flops import Flops, utilization
from nemo_upcycle.planner.hardware import device_peak_tflops


def peak_tflops() -> float | None:
    """Return this device's peak in bf16, in TFLOP/s; None if unknown."""
    import torch

    return device_peak_tflops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


class StepClock:
    """Times the steps of a run.

    Args:
        counted: Operations per sequence.
        peak: Peak of a GPU in TFLOP/s; None looks up the device. If the device is unknown,
            utilization is not given.
        warm_up_steps: Initial steps that are not timed, because kernels are chosen and memory is
            allocated.
    """

    def __init__(self, counted: Flops, peak: float | None = None, warm_up_steps: int = 1) -> None:
        self._flops = counted
        self._peak = peak or peak_tflops()
        self._left = warm_up_steps
        self._ended: float | None = None

    def step_ended(self, sequences: int, gpus: int) -> dict[str, float]:
        """Return the metrics of the step that ends here; none for a step that is not timed.

        Args:
            sequences: Global batch size.
            gpus: GPUs of the job.
        """
        now, started = time.perf_counter(), self._ended
        self._ended = now
        self._left -= 1
        if started is None or self._left >= 0:
            return {}
        return utilization(self._flops, sequences, now - started, gpus, self._peak)

    def forget(self) -> None:
        """Do not time the next step: a validation or a checkpoint comes before it ends."""
        self._ended = None

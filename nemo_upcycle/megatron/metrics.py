"""MoE health and MFU of a run: a callback for Megatron-Bridge, functions for any other loop."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_current_global_batch_size

from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.engine.health import MoEHealth
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.megatron.model import Chunks, described
from nemo_upcycle.planner.flops import flops_of_config
from nemo_upcycle.planner.step_clock import StepClock


class TrainingMetrics:
    """Measures the experts, the routers and the utilization of a run.

    In Megatron-Bridge the object is a callback, `pretrain(…, callbacks=[TrainingMetrics(…)])`: the
    metrics go to the run's TensorBoard and Weights & Biases. Another loop calls `start`, then
    `begin_step` and `end_step` for each step, and `stop`. Every rank makes the same calls.

    The metrics are `moe/…`, see `engine.health.MoEHealth`, and `tflops_per_gpu`, `mfu` and
    `mfu_full_attention`, see `planner.flops.utilization`.

    Args:
        upcycling: What the run was upcycled with, which says where routers began; None omits
            `moe/router_distance`.
        every_n_steps: Steps between two measurements of experts and routers.
        peak_tflops: Peak of a GPU in TFLOP/s; None looks up the device. If the device is unknown,
            utilization is not given.
        warm_up_steps: Initial steps that are not timed.

    Raises:
        UpcyclingError: `every_n_steps` is less than 1.
    """

    def __init__(
        self,
        upcycling: UpcyclingConfig | None = None,
        every_n_steps: int = 50,
        peak_tflops: float | None = None,
        warm_up_steps: int = 1,
    ) -> None:
        if every_n_steps < 1:
            raise UpcyclingError(f"every_n_steps is {every_n_steps}; expected 1 or more.")
        self._upcycling = upcycling
        self._every = every_n_steps
        self._timing = peak_tflops, warm_up_steps
        self._health: MoEHealth | None = None
        self._due = False

    # --- Any loop --------------------------------------------------------------------------------

    def start(self, model: Chunks) -> None:
        """Begin to watch a rank's model.

        Args:
            model: A module per virtual pipeline stage, wrapped by Megatron or not.
        """
        chunks = [_unwrapped(chunk) for chunk in model]
        config = described(chunks, vocab_size_divisible_by=1)
        counted = flops_of_config(config)
        self._clock = StepClock(counted, *self._timing)
        if config.num_moe_experts is not None:
            self._health = MoEHealth()
            self._health.start_watching(chunks, config, self._upcycling)

    def begin_step(self, step: int) -> None:
        """Begin to measure, if it is time; to be called before the forward pass."""
        self._due = self._health is not None and step % self._every == 0
        if self._health is not None and self._due:
            self._health.begin_interval()

    def end_step(self, sequences: int | None = None) -> dict[str, float]:
        """Return the metrics of a step, by name; to be called after the backward pass.

        Args:
            sequences: Global batch size; None takes that of Megatron's calculator.

        Raises:
            UpcyclingError: A router has computed NaN or Inf; the message names its layer.
        """
        found: dict[str, float] = {}
        if self._health is not None and self._due:
            found |= self._health.measure().scalars()
            self._health.check_finite()
        sequences = get_current_global_batch_size() if sequences is None else sequences
        return found | self._clock.step_ended(sequences, torch.distributed.get_world_size())

    def pause(self) -> None:
        """Do not time the next step: a validation or a checkpoint comes before it ends."""
        self._clock.forget()

    def stop(self) -> None:
        """Stop watching."""
        if self._health is not None:
            self._health.stop_watching()

    # --- Megatron-Bridge's events ----------------------------------------------------------------

    def on_train_start(self, context: Any) -> None:
        """Begin to watch."""
        self.start(context.model)

    def on_train_step_start(self, context: Any) -> None:
        """Begin to measure, if it is time."""
        self.begin_step(context.state.train_state.step)

    def on_train_step_end(self, context: Any) -> None:
        """Log the step's metrics."""
        step, found = context.state.train_state.step, self.end_step()
        for log in _loggers(context.state):
            log(found, step)

    def on_eval_start(self, context: Any) -> None:
        """Do not count the evaluation as training."""
        self.pause()

    def on_checkpoint_save(self, context: Any) -> None:
        """Do not count the checkpoint as training."""
        self.pause()

    def on_train_end(self, context: Any) -> None:
        """Stop watching."""
        self.stop()


def _unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """Return the GPT model inside Megatron's wrappers for precision and data parallelism."""
    while isinstance(inner := getattr(module, "module", None), torch.nn.Module):
        module = inner
    return module


def _loggers(state: Any) -> list[Callable[[Mapping[str, float], int], None]]:
    """Return functions that write metrics to what Megatron-Bridge has opened on this rank."""
    tensorboard, wandb = state.tensorboard_logger, state.wandb_logger

    def to_tensorboard(found: Mapping[str, float], step: int) -> None:
        for name, value in found.items():
            tensorboard.add_scalar(name, value, step)

    def to_wandb(found: Mapping[str, float], step: int) -> None:
        wandb.log(dict(found), step)

    opened = ((tensorboard, to_tensorboard), (wandb, to_wandb))
    return [log for logger, log in opened if logger is not None]

"""Logs how the experts and routers of a run are; what is measured is in `engine.health`."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from nemo.utils import AppState
from nemo.utils.model_utils import unwrap_model

from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.engine.health import Health, MoEHealth
from nemo_upcycle.engine.heat_map import draw
from nemo_upcycle.engine.load_record import LOADS, LoadRecord, Loads, read_loads
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.nemo.recorded import Recorded


class MoEHealthCallback(pl.Callback, Recorded, MoEHealth):
    """Log the health of experts and routers, per layer and in total.

    `moe/load_balancing_loss`, `moe/z_loss`: Megatron's losses, which NeMo does not log.
    `moe/expert_load_cv`: coefficient of variation of the experts' loads.
    `moe/dead_experts`: number of experts without a token.
    `moe/dropped_tokens`: share of dropped assignments.
    `moe/router_entropy`: entropy of the scores over all experts, in nats; sigmoid scores are
    divided by their sum.
    `moe/router_confidence`: largest of these scores.
    `moe/expert_bias_range`: largest minus smallest expert bias, if there is one.
    `moe/expert_distance`: mean pairwise distance of a layer's experts, relative to the weights of
    the dense feed-forward layer.
    `moe/router_distance`: distance of the router from the initial router, relative to the latter.

    `health/expert_load.jsonl` in the run's directory has the load of every expert; see
    `engine.load_record`.

    A router that computes NaN ends the run with an error that names the layer.

    Args:
        every_n_steps: Steps between two measurements.
        heat_map: Write `moe_load.png` into the run's directory at the end of the run: load of
            layers × experts over time.
    """

    def __init__(self, every_n_steps: int = 50, heat_map: bool = True) -> None:
        if every_n_steps < 1:
            raise UpcyclingError(f"every_n_steps is {every_n_steps}; expected 1 or more.")
        self.every_n_steps = every_n_steps
        self.heat_map = heat_map
        self._record: LoadRecord | None = None

    # --- Lightning's hooks -----------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Register hooks on the routers, and begin or continue the record of loads."""
        config = pl_module.config
        chunks = [unwrap_model(c.module) for c in trainer.strategy.megatron_parallel]
        self.start_watching(chunks, config, _upcycling(trainer, config))
        directory = AppState().log_dir
        if directory and trainer.is_global_zero:
            self._record = LoadRecord(Path(directory) / LOADS)
            self._record.begin(trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Begin to measure, if it is time."""
        self._due = trainer.global_step % self.every_n_steps == 0
        if self._due:
            self.begin_interval()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Add up over the ranks and log."""
        if not self._due:
            return
        step = trainer.global_step
        health = self.measure()
        self.check_finite()
        for logger in trainer.loggers:
            logger.log_metrics(health.scalars(), step=step)
        if self._record is not None:
            self._record.add(_loads(step, health))

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Write the heat map."""
        self.stop_watching()
        directory = AppState().log_dir
        if self.heat_map and directory and trainer.is_global_zero:
            draw(read_loads(Path(directory) / LOADS), Path(directory) / "moe_load.png")

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Say what is behind Megatron's word of NaN in a gradient."""
        if hasattr(self, "_not_finite"):
            self.check_finite()


def _loads(step: int, health: Health) -> Loads:
    """Return the loads of a measurement; those of a layer without experts are NaN."""
    shares = [None if layer.isnan().any() else tuple(layer.tolist()) for layer in health.load]
    return Loads(step, tuple(shares))


def _upcycling(trainer: pl.Trainer, config: Any) -> UpcyclingConfig | None:
    """Return what the run was upcycled with; None in a run without upcycling."""
    # UpcyclingCallback, which is not of this room.
    upcyclers = [c for c in trainer.callbacks if hasattr(c, "upcycling")]
    return upcyclers[0].upcycling(config) if upcyclers else None

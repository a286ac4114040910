"""The callback that freezes all but the routers for the first steps."""

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl

from nemo_upcycle.engine.router_warm_up import check_optimizer, check_steps, only_routers
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.nemo.recorded import Recorded


class RouterWarmUp(pl.Callback, Recorded):
    """Train only the routers for the first steps of a run; see `engine.router_warm_up`.

    A resumed run continues the warm-up at its step. `grad_norm` and clipping see the routers'
    gradients alone.

    Args:
        steps: Steps in which only the routers are trained.
        verbose: Print a line when the warm-up ends.

    Raises:
        UpcyclingError: `steps` is less than 1.
    """

    def __init__(self, steps: int, verbose: bool = True) -> None:
        check_steps(steps)
        self.steps = steps
        self.verbose = verbose
        self._frozen = ExitStack()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that there are routers, and Adam's betas."""
        if getattr(pl_module.config, "num_moe_experts", None) is None:
            raise UpcyclingError(
                "router_warmup_steps is given for a dense model, which has no routers. Leave it "
                "out."
            )
        check_optimizer(pl_module.optim.config)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """Freeze all but the routers; gradients are reduced by now."""
        if trainer.global_step < self.steps:
            self._frozen.enter_context(only_routers(trainer.strategy.megatron_parallel, optimizer))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Restore the weight decay, before a checkpoint is saved."""
        self._frozen.close()
        if self.verbose and trainer.global_step == self.steps and trainer.is_global_zero:
            print(f"[router warm-up] step {self.steps}: all parameters are trained from here on")

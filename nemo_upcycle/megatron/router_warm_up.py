"""Train only the routers for the first steps of Megatron's own training loop."""

from collections.abc import Sequence
from typing import Any

import torch

from nemo_upcycle.engine.router_warm_up import check_optimizer, check_steps, only_routers


class RouterWarmUp:
    """Freezes all but the routers for the first steps; see `engine.router_warm_up`.

    In Megatron-Bridge the object is a callback, `pretrain(…, callbacks=[RouterWarmUp(100)])`.
    Another loop calls `start` once, after the optimizer is made and a checkpoint is loaded. The
    hook that fills the model records the steps: `upcycle(…, router_warm_up=…)`.

    Args:
        steps: Steps in which only the routers are trained.

    Raises:
        UpcyclingError: `steps` is less than 1.
    """

    def __init__(self, steps: int) -> None:
        check_steps(steps)
        self.steps = steps

    def start(self, models: Sequence[torch.nn.Module], optimizer: Any, step: int = 0) -> None:
        """Let the optimizer's next steps, up to the last of the warm-up, change the routers alone.

        Args:
            models: The rank's models in Megatron's DistributedDataParallel.
            optimizer: Megatron's optimizer.
            step: Steps that the run has made before.

        Raises:
            UpcyclingError: Adam's betas do not fit a warm-up.
        """
        check_optimizer(optimizer.config)
        left, plain_step = self.steps - step, optimizer.step

        def frozen_step() -> Any:
            nonlocal left
            if left <= 0:
                return plain_step()
            left -= 1
            with only_routers(models, optimizer):
                return plain_step()

        optimizer.step = frozen_step

    def on_train_start(self, context: Any) -> None:
        """Begin the warm-up in Megatron-Bridge, or continue the warm-up of a resumed run."""
        self.start(context.model, context.optimizer, context.state.train_state.step)

"""The learning rate and the optimizer's numbers after a resume: what the command says.

NeMo and Megatron load them with the optimizer's state and the schedule's, and so go on with those
of the first start, whatever a later one says.
"""

import copy
from typing import Any

import lightning.pytorch as pl

_PROGRESS = frozenset({"optimizer", "last_epoch"})
"""What a schedule has that is no setting; so is what begins with an underscore."""

_STATE = frozenset({"params", "step", "lr"})
"""What a group of parameters has that is no setting."""


class Hyperparameters:
    """What the command says, taken before a checkpoint is loaded.

    Args:
        trainer: The trainer, whose optimizers and schedules have just been made.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._groups = [
            [_without(group, _STATE) for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]
        self._schedules = [
            {
                name: copy.copy(value)
                for name, value in _without(vars(config.scheduler), _PROGRESS).items()
                if not name.startswith("_")
            }
            for config in trainer.lr_scheduler_configs
        ]

    def apply(self, trainer: pl.Trainer) -> None:
        """Put them in place of those that were loaded, and the learning rate where they say.

        Args:
            trainer: The trainer, at the step where it goes on.
        """
        for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True):
            for loaded, said in zip(optimizer.param_groups, groups, strict=True):
                loaded.update(said)
        for config, said in zip(trainer.lr_scheduler_configs, self._schedules, strict=True):
            vars(config.scheduler).update(said)
            _set_rates(config.scheduler)


def is_function_of_step(scheduler: Any) -> bool:
    """Return whether a schedule depends only on the step, as NeMo's do, and so may change."""
    return type(scheduler).__module__.startswith("nemo.core.optim.lr_scheduler")


def _set_rates(scheduler: Any) -> None:
    if not is_function_of_step(scheduler):
        return
    scheduler._get_lr_called_within_step = True  # or NeMo warns
    rates = scheduler.get_lr()
    scheduler._get_lr_called_within_step = False
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = list(rates)


def _without(values: Any, left_out: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in left_out}

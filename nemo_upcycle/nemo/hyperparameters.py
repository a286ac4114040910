"""Apply the command's learning rate and optimizer settings after a resume.

NeMo and Megatron load these settings with the states of optimizer and schedule. They continue with
the settings of the first start, even if a later command gives other values.
"""

import copy
from typing import Any

import lightning.pytorch as pl

_PROGRESS = frozenset({"optimizer", "last_epoch"})
"""Attributes of a schedule that are not settings, besides underscored attributes."""

_STATE = frozenset({"params", "step", "lr"})
"""Keys of a parameter group that are not settings."""


class Hyperparameters:
    """The command's settings, recorded before a checkpoint is loaded.

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
        """Replace the loaded settings, and set the learning rate accordingly.

        Args:
            trainer: The trainer, at the step where training continues.
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
    scheduler._get_lr_called_within_step = True  # otherwise NeMo warns
    rates = scheduler.get_lr()
    scheduler._get_lr_called_within_step = False
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = list(rates)


def _without(values: Any, left_out: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in left_out}

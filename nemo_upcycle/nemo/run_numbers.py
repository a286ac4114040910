"""Early checks for training numbers that are out of range or contradictory."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl

from nemo_upcycle.errors import UpcyclingError

_AT_LEAST_1 = ("data.seq_length", "data.global_batch_size", "data.micro_batch_size")
_AT_LEAST_0 = (
    *("lr", "weight_decay", "clip_grad", "adam_beta1", "adam_beta2", "adam_eps"),
    *("warmup_steps", "constant_steps", "hold_steps", "min_lr"),
)


_STEPS = "trainer.max_steps"
_BATCHES = "data.micro_batch_size and data.global_batch_size"
_NOT_HONORED: dict[str, tuple[tuple[Any, ...], str]] = {
    "trainer.accumulate_grad_batches": ((1,), _BATCHES),
    "trainer.gradient_clip_val": ((None,), "optim.config.clip_grad"),
    "trainer.gradient_clip_algorithm": ((None,), "optim.config.clip_grad, which clips the norm"),
    "trainer.limit_train_batches": ((None, 1.0), _STEPS),
    "trainer.overfit_batches": ((0.0, 0), _STEPS),
    "trainer.fast_dev_run": ((False,), _STEPS),
    "trainer.max_epochs": ((None, -1), _STEPS),
    "trainer.reload_dataloaders_every_n_epochs": ((0,), _STEPS),
    "data.rampup_batch_size": ((None,), "data.global_batch_size"),
    "data.init_consumed_samples": ((None, 0), "resume.resume_if_exists"),
    "data.init_global_step": ((None, 0), "resume.resume_if_exists"),
}
"""Fields that NeMo accepts and ignores: the values without effect, and the field to use instead.

With Lightning's accumulation, limits and epochs, the data would start again. NeMo's data make only
one pass of max_steps · global_batch_size samples. NeMo does not save the batch sizes of a ramp-up.
"""


def check_max_steps(max_steps: int) -> None:
    """Check the number of steps.

    Raises:
        UpcyclingError: The number is below 1. Data and learning rate are made for a number of
            steps, so there is no endless run.
    """
    if max_steps < 1:
        raise UpcyclingError(f"max_steps is {max_steps}; expected 1 or more: a run has an end.")


def check_trainer(trainer: pl.Trainer) -> None:
    """Check the trainer's numbers of steps and validations, from which the data are made.

    Raises:
        UpcyclingError: A number is out of range, or belongs to a field that NeMo ignores.
    """
    check_max_steps(trainer.max_steps)
    for name, (idle, instead) in _NOT_HONORED.items():
        value = _value(trainer, name)
        # For Lightning, 1.0 means all batches and 1 means one batch.
        if not any(type(value) is type(each) and value == each for each in idle):
            raise UpcyclingError(
                f"{name} is {value}, which NeMo does not honor; expected {idle[0]}. Set {instead} "
                "instead."
            )
    interval = trainer.val_check_interval  # steps, or a fraction of an epoch
    if interval is not None and not interval > 0:
        raise UpcyclingError(
            f"trainer.val_check_interval is {interval}; expected 1 step or more. To leave "
            "validation out, set trainer.limit_val_batches=0."
        )


def check_numbers(trainer: pl.Trainer, module: pl.LightningModule) -> list[str]:
    """Check the numbers of trainer, data, optimizer and schedule.

    Args:
        trainer: The trainer, with its data.
        module: NeMo's model, with its optimizer.

    Returns:
        Remarks, one line each, on allowed values that may be unintended.

    Raises:
        UpcyclingError: A number is out of range, or contradicts another number.
    """
    check_trainer(trainer)
    holders = {"data": getattr(trainer, "datamodule", None)}
    for name in _AT_LEAST_1:
        value = getattr(holders["data"], name.removeprefix("data."), None)
        if value is not None and not value >= 1:
            raise UpcyclingError(f"{name} is {value}; expected 1 or more.")
    optim = getattr(module, "optim", None)
    config, scheduler = getattr(optim, "config", None), getattr(optim, "lr_scheduler", None)
    for place, owner in (("optim.config", config), ("optim.lr_scheduler", scheduler)):
        for name in _AT_LEAST_0:
            value = getattr(owner, name, None)
            if isinstance(value, int | float) and not value >= 0:
                raise UpcyclingError(f"{place}.{name} is {value}; expected 0 or more.")
    _check_remainders(trainer, config)
    return list(_check_schedule(config, scheduler, trainer.max_steps))


def _check_remainders(trainer: pl.Trainer, config: Any) -> None:
    """Check that a checkpoint's optimizer can be loaded again."""
    remainders = getattr(config, "use_precision_aware_optimizer", False) and getattr(
        config, "store_param_remainders", False
    )
    strategy = getattr(trainer, "strategy", None)
    if remainders and getattr(strategy, "ckpt_optim_fully_reshardable", False):
        raise UpcyclingError(
            "optim.config.store_param_remainders is True with "
            "trainer.strategy.ckpt_optim_fully_reshardable=True; Megatron would save checkpoints "
            "that it cannot load. Set optim.config.store_param_remainders=False."
        )


def _value(trainer: pl.Trainer, name: str) -> Any:
    """Return a field of the trainer or its data; a value without effect if the field is missing."""
    owner, _, field = name.partition(".")
    data = getattr(trainer, "datamodule", None)
    # NeMo's data modules pass some fields on without keeping them.
    places = (trainer,) if owner == "trainer" else (getattr(data, "data_sampler", None), data)
    values = (getattr(place, field) for place in places if hasattr(place, field))
    return next(values, _NOT_HONORED[name][0][0])


def _check_schedule(config: Any, scheduler: Any, max_steps: int) -> Iterator[str]:
    lr, min_lr = getattr(config, "lr", None), getattr(scheduler, "min_lr", None)
    warmup = getattr(scheduler, "warmup_steps", None) or 0
    if lr is not None and min_lr is not None and lr < min_lr and warmup < max_steps:
        raise UpcyclingError(
            f"optim.config.lr is {lr}, below optim.lr_scheduler.min_lr, which is {min_lr}: the "
            "learning rate would rise to its minimum. Give a lower optim.lr_scheduler.min_lr too."
        )
    if warmup >= max_steps:
        yield (
            f"optim.lr_scheduler.warmup_steps is {warmup}, trainer.max_steps {max_steps}: the "
            f"learning rate does not get to optim.config.lr={lr}"
        )
    unused = getattr(config, "min_lr", None)
    if unused is not None and min_lr is not None and unused != min_lr:
        yield (
            f"optim.config.min_lr={unused} is not used: the learning rate ends at "
            f"optim.lr_scheduler.min_lr={min_lr}"
        )

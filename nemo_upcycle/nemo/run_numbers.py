"""Numbers of a training that make no sense, found before anything is made of them."""

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
_NOT_HONOURED: dict[str, tuple[tuple[Any, ...], str]] = {
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
"""What NeMo takes and does not do: the values that change nothing, and the field that works.

With its accumulation, limits and epochs Lightning begins the data anew, which NeMo makes for one
pass of max_steps · global_batch_size samples; NeMo saves no batch sizes of a ramp-up.
"""


def check_max_steps(max_steps: int) -> None:
    """Check how long a run is to be.

    Raises:
        UpcyclingError: Not even a step. Data and learning rate are made for a number of steps, so
            there is no run without end.
    """
    if max_steps < 1:
        raise UpcyclingError(f"max_steps is {max_steps}; expected 1 or more: a run has an end.")


def check_trainer(trainer: pl.Trainer) -> None:
    """Check how long a run is, and how often it validates: the data are made by these numbers.

    Raises:
        UpcyclingError: A number is out of range, or of a field that NeMo does not honour.
    """
    check_max_steps(trainer.max_steps)
    for name, (idle, instead) in _NOT_HONOURED.items():
        value = _value(trainer, name)
        # To Lightning 1.0 is all batches, 1 is one.
        if not any(type(value) is type(each) and value == each for each in idle):
            raise UpcyclingError(
                f"{name} is {value}, which NeMo does not honour; expected {idle[0]}. Set {instead} "
                "instead."
            )
    interval = trainer.val_check_interval  # steps, or a share of an epoch
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
        What is allowed and may not be meant, a line each.

    Raises:
        UpcyclingError: A number is out of range, or contradicts another.
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
    return list(_check_schedule(config, scheduler, trainer.max_steps))


def _value(trainer: pl.Trainer, name: str) -> Any:
    """Return a field of the trainer or its data; where there is none, what changes nothing."""
    owner, _, field = name.partition(".")
    data = getattr(trainer, "datamodule", None)
    # NeMo's data modules hand some of their fields on, and forget them.
    places = (trainer,) if owner == "trainer" else (getattr(data, "data_sampler", None), data)
    values = (getattr(place, field) for place in places if hasattr(place, field))
    return next(values, _NOT_HONOURED[name][0][0])


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

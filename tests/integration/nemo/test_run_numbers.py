"""Numbers of trainer, data, optimizer and schedule that make no sense."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.nemo.run_numbers import check_numbers


def checked(**changes: Any) -> list[str]:
    """Check the numbers of a run of 100 steps with some of them changed."""
    values = {
        "trainer": {"max_steps": 100, "val_check_interval": 50},
        "data": {"seq_length": 256, "global_batch_size": 16, "micro_batch_size": 4},
        "config": {"lr": 3e-3, "min_lr": 3e-4, "weight_decay": 0.1, "clip_grad": 1.0},
        "scheduler": {"min_lr": 3e-4, "warmup_steps": 20, "constant_steps": 0},
    }
    for name, value in changes.items():
        owner, _, field = name.partition("__")
        values[owner][field] = value
    made = {name: SimpleNamespace(**each) for name, each in values.items()}
    sampler = {"rampup_batch_size": values["data"].pop("rampup_batch_size", None)}
    made["data"].data_sampler = SimpleNamespace(**sampler)  # NeMo's data have it there alone
    trainer: Any = SimpleNamespace(**values["trainer"], datamodule=made["data"])
    optim = SimpleNamespace(config=made["config"], lr_scheduler=made["scheduler"])
    module: Any = SimpleNamespace(optim=optim)
    return check_numbers(trainer, module)


def test_usual_numbers_are_not_mentioned() -> None:
    assert checked() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainer__max_steps": 0}, "max_steps is 0; expected 1 or more"),
        ({"trainer__max_steps": -1}, "max_steps is -1; expected 1 or more"),
        ({"trainer__val_check_interval": 0}, "trainer.val_check_interval is 0"),
        ({"trainer__val_check_interval": -5}, "trainer.val_check_interval is -5"),
        ({"data__micro_batch_size": 0}, "data.micro_batch_size is 0; expected 1 or more"),
        ({"data__seq_length": -1}, "data.seq_length is -1; expected 1 or more"),
        ({"config__lr": -1e-3}, "optim.config.lr is -0.001; expected 0 or more"),
        ({"config__lr": float("nan")}, "optim.config.lr is nan; expected 0 or more"),
        ({"config__weight_decay": -0.1}, "optim.config.weight_decay is -0.1"),
        ({"scheduler__warmup_steps": -3}, "optim.lr_scheduler.warmup_steps is -3"),
        ({"config__lr": 1e-6}, "below optim.lr_scheduler.min_lr"),
        (
            {
                "config__use_precision_aware_optimizer": True,
                "config__store_param_remainders": True,
                "trainer__strategy": SimpleNamespace(ckpt_optim_fully_reshardable=True),
            },
            "checkpoints that it cannot load. Set optim.config.store_param_remainders=False",
        ),
    ],
)
def test_nonsense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UpcyclingError, match=message):
        checked(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainer__accumulate_grad_batches": 2}, "Set data.micro_batch_size and data.global_"),
        ({"trainer__gradient_clip_val": 1.0}, "Set optim.config.clip_grad instead"),
        ({"trainer__gradient_clip_algorithm": "value"}, "Set optim.config.clip_grad, which clips"),
        ({"trainer__limit_train_batches": 3}, "Set trainer.max_steps instead"),
        ({"trainer__limit_train_batches": 1}, "limit_train_batches is 1, which NeMo does not"),
        ({"trainer__limit_train_batches": 0.5}, "limit_train_batches is 0.5, which NeMo does not"),
        ({"trainer__overfit_batches": 1}, "trainer.overfit_batches is 1, which NeMo does not"),
        ({"trainer__fast_dev_run": True}, "trainer.fast_dev_run is True, which NeMo does not"),
        ({"trainer__max_epochs": 1}, "trainer.max_epochs is 1, which NeMo does not honor"),
        ({"trainer__reload_dataloaders_every_n_epochs": 1}, "every_n_epochs is 1, which NeMo"),
        ({"data__rampup_batch_size": [8, 8, 64]}, "Set data.global_batch_size instead"),
        ({"data__init_consumed_samples": 8}, "data.init_consumed_samples is 8, which NeMo does"),
        ({"data__init_global_step": 8}, "data.init_global_step is 8, which NeMo does not honor"),
    ],
)
def test_what_nemo_does_not_honor_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UpcyclingError, match=re.escape(message)):
        checked(**change)


def test_what_changes_nothing_may_be_said() -> None:
    idle = {"accumulate_grad_batches": 1, "limit_train_batches": 1.0, "max_epochs": -1}
    assert checked(**{f"trainer__{name}": value for name, value in idle.items()}) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"trainer__max_steps": 6, "config__lr": 1e-6}, "warmup_steps is 20, trainer.max_steps 6"),
        ({"config__min_lr": 0.0}, "optim.config.min_lr=0.0 is not used"),
    ],
)
def test_what_may_not_be_meant_is_said(change: dict[str, Any], line: str) -> None:
    assert any(line in remark for remark in checked(**change))

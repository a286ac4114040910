"""Which settings of a run are compared on a resume."""

from types import SimpleNamespace
from typing import Any

import torch

from nemo_upcycle.nemo.run_settings import compare, settings_of


def settings(**config: Any) -> dict[str, Any]:
    optim = SimpleNamespace(config=SimpleNamespace(lr=1e-3, **config), lr_scheduler=None)
    module: Any = SimpleNamespace(optim=optim, config=None)
    trainer: Any = SimpleNamespace(
        max_steps=3,
        callbacks=(),
        precision_plugin=SimpleNamespace(precision="bf16-mixed"),
        datamodule=None,
    )
    return settings_of(trainer, module)


def test_another_precision_of_the_moments_is_said() -> None:
    fp32 = settings(exp_avg_dtype=torch.float32, main_grads_dtype=torch.float32)
    bf16 = settings(exp_avg_dtype=torch.bfloat16, main_grads_dtype=torch.float32)
    assert compare(fp32, bf16, "run") == [
        "optim.config.exp_avg_dtype torch.float32 → torch.bfloat16"
    ]


def test_where_the_optimizer_is_does_not_matter() -> None:
    here, there = (settings(optimizer_offload_fraction=part) for part in (0.0, 0.75))
    assert compare(here, there, "run") == []

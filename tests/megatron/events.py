"""A training loop that fires Megatron-Bridge's events, in the order of its own loop."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.megatron import TrainingMetrics, upcycle
from tests.megatron import scenarios

EVALUATED_AFTER, SAVED_AFTER = 3, 5


@dataclass
class Logger:
    """What a TensorBoard writer and Weights & Biases are told."""

    scalars: dict[int, dict[str, float]] = field(default_factory=dict)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.setdefault(step, {})[name] = value

    def log(self, values: dict[str, float], step: int) -> None:
        self.scalars.setdefault(step, {}).update(values)


def logged(
    dense: Path,
    folding: ParallelFolding,
    upcycling: UpcyclingConfig,
    ids: torch.Tensor,
    steps: int,
    every_n_steps: int,
) -> dict[str, dict[int, dict[str, float]]]:
    """Train, and return what the callback logs, by logger and step; on the last rank alone."""
    callback = TrainingMetrics(upcycling, every_n_steps, peak_tflops=0.5)
    tensorboard, wandb = Logger(), Logger()
    is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    state = SimpleNamespace(
        train_state=SimpleNamespace(step=0),
        tensorboard_logger=tensorboard if is_last else None,
        wandb_logger=wandb if is_last else None,
    )
    models = scenarios.build(dense, folding, upcycling, [upcycle(str(dense), upcycling)], wrap=True)

    def fire(event: str, context: Any) -> None:
        if handler := getattr(callback, event, None):  # as Bridge's manager finds handlers
            handler(context)

    train(models, ids, steps, state, fire)
    return {"tensorboard": tensorboard.scalars, "wandb": wandb.scalars}


def train(
    models: scenarios.Chunks,
    ids: torch.Tensor,
    steps: int,
    state: Any,
    fire: Callable[[str, Any], None],
) -> None:
    """Run forward and backward of some steps; Bridge counts a step after the event of its end."""
    init_num_microbatches_calculator(
        0, None, len(ids), 1, parallel_state.get_data_parallel_world_size()
    )
    context = SimpleNamespace(state=state, model=models, user_state={})
    fire("on_train_start", context)
    for step in range(steps):
        fire("on_train_step_start", context)
        scenarios.train_step(models, scenarios.rows_here(ids))
        fire("on_train_step_end", context)
        state.train_state.step += 1
        if step == EVALUATED_AFTER:
            for event in ("on_eval_start", "on_eval_step_start", "on_eval_step_end", "on_eval_end"):
                fire(event, context)
        if step == SAVED_AFTER:
            fire("on_checkpoint_save", context)
    fire("on_train_end", context)

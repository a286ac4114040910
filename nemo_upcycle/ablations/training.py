"""A training of an arm through NeMo, with measurements before the first step and after the last."""

import os
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import fiddle
import lightning.pytorch as pl
import nemo_run as run
import torch
from megatron.core.transformer.moe.router import TopKRouter
from nemo.utils.model_utils import unwrap_model
from nemo_upcycle_recipes import factory

from nemo_upcycle.ablations.dense_directory import KeptWeights
from nemo_upcycle.ablations.held_out import Assigned, HeldOut, Questions, dropless
from nemo_upcycle.ablations.inputs import with_statistics
from nemo_upcycle.ablations.results import OVER_TIME, Job, Result
from nemo_upcycle.data.paths import text_of
from nemo_upcycle.engine.health import MoEHealth
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.evaluation.checks import open_tokenizer

FIRST_STEPS = 2
"""Steps whose time does not count: kernels are compiled and memory is allocated."""


def train(job: Job, scratch: Path, began: float) -> None:
    """Train, measure and store the result, in a dedicated process.

    Args:
        job: The training.
        scratch: Directory for temporary files.
        began: When the process began, of `time.perf_counter`.

    Raises:
        UpcyclingError: The training cannot be set up, or ended early.
    """
    os.environ["PL_GLOBAL_SEED"] = str(job.seed)
    recipe, base, workspace = recipe_of(job, scratch), job.arm.base, job.workspace
    held_out = HeldOut(
        workspace.paths, recipe.data.split, recipe.data.seq_length, base.rows, base.rows_at_once
    )
    questions = None
    if workspace.items is not None:
        # Questions are shorter than rows, in the logits' memory of one forward pass.
        at_once = 4 * base.rows_at_once
        questions = Questions(workspace.items, open_tokenizer(workspace.dense), at_once)
    watch = Watch(held_out, questions, job.steps // 2)
    started = time.process_time()
    built = fiddle.build(recipe)
    built.keywords["trainer"].callbacks.append(watch)
    if job.weights is not None:
        kept = KeptWeights(workspace.dense, job.weights)
        built.keywords["trainer"].callbacks.append(kept)
    built()
    if watch.steps != job.steps:
        raise UpcyclingError(f"{job.name} ended after {watch.steps} steps of {job.steps}.")
    (start, capped_start, _), *_, (end, capped_end, dropped) = watch.scores
    seconds = time.process_time() - started
    per_step = watch.step_seconds
    others: dict[str, Any] = {"over_time": dict(watch.over_time)}
    if per_step is not None:
        other = time.perf_counter() - began - job.steps * per_step
        others |= {"step_seconds": per_step, "other_seconds": max(0.0, other)}
    if questions is not None:
        others |= dict(zip(("start_accuracy", "end_accuracy"), watch.accuracies, strict=True))
    job.keep(
        Result(
            start, end, capped_start, capped_end, dropped, held_out.tokens, round(seconds, 1),
            **others,
        )
    )  # fmt: skip


def recipe_of(job: Job, scratch: Path) -> run.Partial:
    """Return the training's recipe from the recipes' factory, without checkpoints."""
    numbers, workspace = job.recipe, job.workspace
    if job.arm.start != "dense":
        numbers = replace(numbers, upcycling=replace(numbers.upcycling, seed=job.seed))
    extra: dict[str, int] = {}
    if job.statistics is not None:
        upcycling = with_statistics(numbers.upcycling, job.statistics)
        numbers = replace(numbers, upcycling=upcycling)
    if job.arm.router_warmup_steps:
        extra["router_warmup_steps"] = job.arm.router_warmup_steps
    recipe = factory.pretrain(
        numbers,
        dir=str(workspace.directory),
        name=job.name,
        dense_checkpoint=job.dense_checkpoint,
        tokenizer=None,
        data_paths=text_of(workspace.paths),
        max_steps=job.steps,
        from_scratch=job.arm.start == "scratch",
        accelerator=job.arm.base.accelerator,
        **extra,
    )
    recipe.log.log_dir, recipe.log.ckpt, recipe.log.tensorboard = str(scratch), None, None
    recipe.resume = None
    recipe.trainer.enable_checkpointing = False
    recipe.trainer.limit_val_batches = 0
    recipe.data.seed, recipe.data.num_train_samples = job.seed, job.samples
    recipe.data.index_mapping_dir = str(scratch / "index")
    return recipe


class HeldOutHealth(MoEHealth):
    """Routers over held-out text, between `begin_interval` and `measure`."""

    def counts(self, router: TopKRouter) -> bool:
        """Return whether a forward pass counts: one without training."""
        return not router.training


class Watch(pl.Callback):
    """A callback that measures before the first step, halfway and after the last.

    Args:
        held_out: Text for the loss and the routers.
        questions: Asked before the first step and after the last.
        halfway: The step after which routers and loss are measured once more.
    """

    def __init__(
        self, held_out: HeldOut, questions: Questions | None = None, halfway: int = 0
    ) -> None:
        self.held_out, self.questions, self.halfway = held_out, questions, halfway
        self.over_time: dict[str, list[float]] = defaultdict(list)
        self.scores: list[tuple[float, float, float]] = []
        self.accuracies: list[float] = []
        self.steps = 0
        self._ends: list[float] = []
        self._parent = os.getppid()

    @property
    def step_seconds(self) -> float | None:
        """Median seconds per step; None after too few steps."""
        times = [after - before for before, after in zip(self._ends, self._ends[1:], strict=False)]
        times = times[FIRST_STEPS - 1 :]
        return statistics.median(times) if times else None

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Measure the model before the first step."""
        self._measure(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Count the step; end this process if the parent was killed."""
        self.steps = trainer.global_step
        self._ends.append(time.perf_counter())
        if os.getppid() != self._parent:
            os._exit(1)
        if self.steps == self.halfway:
            self._measure(trainer, halfway=True)

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Measure the model after the last step."""
        self._measure(trainer)

    def _measure(self, trainer: pl.Trainer, halfway: bool = False) -> None:
        """Measure without a capacity, and with the training's capacity factor."""
        (chunk,) = trainer.strategy.megatron_parallel
        model = unwrap_model(chunk.module)
        model.eval()
        with dropless(model) as routers:
            loss = self._measure_over_time(model, bool(routers))
            if self.questions is not None and not halfway:
                self.accuracies.append(self.questions.accuracy(model))
        if not halfway and any(r.config.moe_expert_capacity_factor for r in routers):
            counted = Assigned()
            hooks = [router.register_forward_hook(counted) for router in routers]
            capped = self.held_out.loss(model)
            for hook in hooks:
                hook.remove()
            self.scores.append((loss, capped, 1 - counted.kept / counted.wanted))
        else:
            self.scores.append((loss, loss, 0.0))
        model.train()

    def _measure_over_time(self, model: torch.nn.Module, is_moe: bool) -> float:
        """Keep the loss, and what routers and experts do; return the loss."""
        if is_moe:
            health = HeldOutHealth()
            health.start_watching([model], model.config)
            health.begin_interval()
        loss = self.held_out.loss(model)
        self.over_time["loss"].append(loss)
        if is_moe:
            health.stop_watching()
            found = health.measure().scalars()
            for name in OVER_TIME:
                self.over_time[name].append(found[f"moe/{name}"])
        return loss

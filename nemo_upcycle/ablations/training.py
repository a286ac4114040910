"""A training of the tiny recipe through NeMo, and the loss on held-out text.

Legend of the shapes: R rows, L tokens per row, V vocabulary.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fiddle
import lightning.pytorch as pl
import nemo_run as run
import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.transformer.moe.router import TopKRouter
from nemo.utils.model_utils import unwrap_model
from nemo_upcycle_recipes import components, llama_tiny

from nemo_upcycle.ablations.results import Job, Result
from nemo_upcycle.ablations.studies import BATCH
from nemo_upcycle.errors import UpcyclingError

ROWS = 100
"""Rows per corpus for the held-out loss; two corpora have 51,200 tokens in total."""

ROWS_AT_ONCE = 20


def train(job: Job, scratch: Path) -> None:
    """Train, measure and store the result, in a dedicated process.

    Args:
        job: The training.
        scratch: Directory for temporary files.

    Raises:
        UpcyclingError: The training cannot be set up, or ended early.
    """
    os.environ["PL_GLOBAL_SEED"] = str(job.seed)
    recipe = recipe_of(job, scratch)
    held_out = HeldOut(recipe.data.paths, recipe.data.split, recipe.data.seq_length)
    watch = _Watch(held_out)
    started = time.process_time()
    built = fiddle.build(recipe)
    built.keywords["trainer"].callbacks.append(watch)
    built()
    if watch.steps != job.steps:
        raise UpcyclingError(f"{job.name} ended after {watch.steps} steps of {job.steps}.")
    (start, capped_start, _), (end, capped_end, dropped) = watch.scores
    seconds = time.process_time() - started
    job.keep(
        Result(start, end, capped_start, capped_end, dropped, held_out.tokens, round(seconds, 1))
    )


def recipe_of(job: Job, scratch: Path) -> run.Partial:
    """Return the training's recipe from the recipe's factory, without checkpoints."""
    arm, directory = job.arm, job.workspace.directory
    numbers: dict[str, Any] = BATCH | dict(arm.numbers)
    if arm.start == "dense":
        factory = llama_tiny.dense_recipe
        numbers["dense_checkpoint"] = str(job.workspace.dense)
    else:
        factory = llama_tiny.upcycled_recipe
        numbers |= {"seed": job.seed, "from_scratch": arm.start == "scratch"}
    recipe = factory(
        dir=str(directory), name=job.name, max_steps=job.steps, accelerator="cpu", **numbers
    )
    recipe.optim = components.optim(arm.recipe.schedule, arm.recipe.precision)
    recipe.log.log_dir, recipe.log.ckpt, recipe.log.tensorboard = str(scratch), None, None
    recipe.resume = None
    recipe.trainer.enable_checkpointing = False
    recipe.trainer.limit_val_batches = 0
    recipe.data.seed, recipe.data.num_train_samples = job.seed, job.samples
    recipe.data.index_mapping_dir = str(scratch / "index")
    return recipe


class HeldOut:
    """Held-out text: the documents of a blend after the training split.

    Args:
        paths: Alternating weights and Megatron prefixes.
        split: Megatron's split; all but the first part is held out.
        seq_length: Tokens per row.

    Raises:
        UpcyclingError: A corpus holds out less than a row.
    """

    def __init__(self, paths: list[str], split: str, seq_length: int) -> None:
        weights = [float(weight) for weight in paths[::2]]
        self.weights = [weight / sum(weights) for weight in weights]
        self.corpora = [_rows(path, split, seq_length) for path in paths[1::2]]
        self.tokens = sum(rows.shape[0] * seq_length for rows in self.corpora)

    @torch.no_grad()
    def loss(self, model: torch.nn.Module) -> float:
        """Return the mean language-model loss, with corpora weighted as in the blend."""
        parts = zip(self.weights, self.corpora, strict=True)
        return sum(weight * _loss(model, rows) for weight, rows in parts)


def _rows(path: str, split: str, seq_length: int) -> torch.Tensor:
    """Return rows of a corpus's held-out documents, [R, L + 1]; adjacent rows share a token."""
    corpus = IndexedDataset(path)
    parts = [float(part) for part in split.split(",")]
    count = len(corpus.sequence_lengths)
    first = round(parts[0] / sum(parts) * count)
    tokens: list[np.ndarray] = []
    while first < count and sum(map(len, tokens)) <= ROWS * seq_length:
        tokens.append(corpus[first])
        first += 1
    ids = torch.from_numpy(np.concatenate(tokens or [np.zeros(0)]).astype(np.int64))
    if len(ids) <= seq_length:
        raise UpcyclingError(
            f"{path} holds out {len(ids)} tokens; expected more than {seq_length}. Use a larger "
            "corpus."
        )
    return ids.unfold(0, seq_length + 1, seq_length)[:ROWS]


def _loss(model: torch.nn.Module, rows: torch.Tensor) -> float:
    total = 0.0
    for part in rows.split(ROWS_AT_ONCE):
        ids_RL, targets_RL = part[:, :-1], part[:, 1:]
        positions = torch.arange(ids_RL.shape[1]).expand_as(ids_RL)
        # Without a mask, attention is causal.
        logits_RLV = model(ids_RL.contiguous(), positions, attention_mask=None)
        total += float(
            torch.nn.functional.cross_entropy(
                logits_RLV.float().flatten(0, 1), targets_RL.flatten(), reduction="sum"
            )
        )
    return total / rows[:, 1:].numel()


@dataclass
class _Assigned:
    """A forward hook that counts the assignments of routers, before and after dropping."""

    wanted: int = 0
    kept: int = 0

    def __call__(self, router: TopKRouter, inputs: Any, outputs: Any) -> None:
        self.wanted += inputs[0].shape[:-1].numel() * router.topk
        self.kept += int(outputs[1].sum())


class _Watch(pl.Callback):
    """A callback that measures the held-out loss before the first step and after the last."""

    def __init__(self, held_out: HeldOut) -> None:
        self.held_out = held_out
        self.scores: list[tuple[float, float, float]] = []
        self.steps = 0
        self._parent = os.getppid()

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._measure(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps = trainer.global_step
        if os.getppid() != self._parent:  # the parent was killed
            os._exit(1)

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._measure(trainer)

    def _measure(self, trainer: pl.Trainer) -> None:
        """Measure without a capacity, and with the training's capacity factor."""
        (chunk,) = trainer.strategy.megatron_parallel
        model = unwrap_model(chunk.module)
        model.eval()
        with _dropless(model) as routers:
            loss = self.held_out.loss(model)
        if any(router.config.moe_expert_capacity_factor for router in routers):
            counted = _Assigned()
            hooks = [router.register_forward_hook(counted) for router in routers]
            capped = self.held_out.loss(model)
            for hook in hooks:
                hook.remove()
            self.scores.append((loss, capped, 1 - counted.kept / counted.wanted))
        else:
            self.scores.append((loss, loss, 0.0))
        model.train()


@contextmanager
def _dropless(model: torch.nn.Module) -> Iterator[list[TopKRouter]]:
    """Disable the capacity factor temporarily, because transformers drops no tokens."""
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    configs = {id(router.config): router.config for router in routers}.values()
    before = [config.moe_expert_capacity_factor for config in configs]
    for config in configs:
        config.moe_expert_capacity_factor = None
    try:
        yield routers
    finally:
        for config, factor in zip(configs, before, strict=True):
            config.moe_expert_capacity_factor = factor

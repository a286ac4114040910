"""A training loop as Megatron-LM's: the hook, the optimizer, checkpoints with a tracker."""

import contextlib
import io
import os
import signal
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.utils import get_model_config

from nemo_upcycle.check.models import Chunks, rows_here, shards, train_step
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.megatron import RouterWarmUp, upcycle
from tests.megatron import broken, scenarios
from tests.tiny import tokens

TRACKER = "latest_checkpointed_iteration.txt"


def train(
    dense: Path,
    folding: ParallelFolding,
    upcycling: UpcyclingConfig,
    run: Path,
    steps: int,
    killed_after: int | None = None,
    breakage: str | None = None,
    warm_up: int | None = None,
) -> dict[str, Any]:
    """Start a run, or resume it; save at every second step.

    Args:
        dense: The dense checkpoint.
        folding: The mapping.
        upcycling: What its feed-forward layers become.
        run: Directory that is saved to and loaded from.
        steps: The last step.
        killed_after: Step after which all ranks are killed.
        breakage: What breaks the hook, of `broken`.
        warm_up: Steps in which only the routers are trained.

    Returns:
        `losses` of the steps that ran, names of parameters that have `changed`, and what was
        `said`; or the `error`.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            only_routers = None if warm_up is None else RouterWarmUp(warm_up)
            hook = upcycle(str(dense), upcycling, resume_from=run, router_warm_up=only_routers)
            if breakage is not None:
                hook = getattr(broken, breakage)(hook)
            losses, changed = _train(
                dense, folding, upcycling, run, steps, killed_after, hook, only_routers
            )
    except UpcyclingError as error:
        return {"error": str(error), "said": said.getvalue()}
    return {"losses": losses, "changed": changed, "said": said.getvalue()}


def _train(
    dense: Path,
    folding: ParallelFolding,
    upcycling: UpcyclingConfig,
    run: Path,
    steps: int,
    killed_after: int | None,
    hook: Any,
    warm_up: RouterWarmUp | None,
) -> tuple[dict[int, float], set[str]]:
    models = scenarios.build(
        dense, folding, upcycling, [hook], wrap=True, ddp={"use_distributed_optimizer": True}
    )
    get_model_config(models[0]).finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(
        # Megatron's default beta2 of 0.999 is refused with a warm-up of routers.
        OptimizerConfig(lr=1e-3, adam_beta2=0.95, use_distributed_optimizer=True),
        models,
    )
    first = _load(models, optimizer, run)
    if warm_up is not None:
        state = SimpleNamespace(train_state=SimpleNamespace(step=first))
        context = SimpleNamespace(model=models, optimizer=optimizer, state=state)
        warm_up.on_train_start(context)
    before = shards([model.module for model in models])
    losses = {}
    for step in range(first + 1, steps + 1):
        for model in models:
            model.zero_grad_buffer()
        optimizer.zero_grad()
        rows = rows_here(tokens(rows=4, length=33, seed=step))
        losses[step] = train_step(models, rows)
        optimizer.step()
        if step % 2 == 0:
            _save(models, optimizer, run, step)
        if step == killed_after:
            torch.distributed.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
    after = shards([model.module for model in models])
    pairs = zip(before, after, strict=True)
    changed = {shard.name for (shard, old), (_, new) in pairs if not torch.equal(old, new)}
    return losses, changed


def _state(models: Chunks, optimizer: Any, is_loading: bool) -> dict[str, Any]:
    state = scenarios.sharded_state([model.module for model in models])
    # As --dist-ckpt-optim-fully-reshardable has it; the state can be loaded on another mapping.
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
    }
    optimizer_state = optimizer.sharded_state_dict(state, is_loading, metadata=metadata)
    return {**state, "optimizer": optimizer_state}


def _save(models: Chunks, optimizer: Any, run: Path, step: int) -> None:
    directory = run / f"iter_{step:07d}"
    directory.mkdir(parents=True, exist_ok=True)
    common = {"args": Namespace(), "checkpoint_version": 3.0, "iteration": step}
    dist_checkpointing.save({**common, **_state(models, optimizer, False)}, str(directory))
    if torch.distributed.get_rank() == 0:
        (run / TRACKER).write_text(str(step))
    torch.distributed.barrier()


def _load(models: Chunks, optimizer: Any, run: Path) -> int:
    """Load the last checkpoint, if there is one; return its step."""
    if not (run / TRACKER).is_file():
        return 0
    step = int((run / TRACKER).read_text())
    state = dist_checkpointing.load(_state(models, optimizer, True), str(run / f"iter_{step:07d}"))
    names = ["model"] if len(models) == 1 else [f"model{index}" for index in range(len(models))]
    for name, model in zip(names, models, strict=True):
        model.module.load_state_dict(state[name])
    optimizer.load_state_dict(state["optimizer"])
    return step

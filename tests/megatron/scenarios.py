"""What the ranks of a test do with Megatron's own training library; no NeMo."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from megatron.training.models.gpt import GPTModelBuilder

from nemo_upcycle.check.models import (
    Chunks,
    Logits,
    Shards,
    fill_with_nan,
    gradients,
    logits,
    make_experts_differ,
    rows_here,
    shards,
    train_step,
)
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.engine.health import MoEHealth
from nemo_upcycle.megatron import gpt_model_config, upcycle
from tests.megatron import broken

UPCYCLING = UpcyclingConfig(moe_aux_loss_coeff=0.0)
"""The auxiliary loss depends on how a batch is split, so gradients would."""


@dataclass(frozen=True)
class Way:
    """A dense checkpoint, or several, and what is other than usual of the upcycling."""

    source: str
    initializer: str = "copy"
    read_once: bool = False


@dataclass(frozen=True)
class Evidence:
    """What one rank shows of upcycling and a step of training.

    Attributes:
        weights: What it owns after upcycling, by way of upcycling.
        logits: At step 0, with their positions; None but on the last pipeline stage.
        loss: The rank's part of the mean loss of the rows of its data-parallel rank; 0 but on the
            last stage.
        gradients: Of what it owns, as its optimizer has them.
        grad_norm: All gradients' norm, as the optimizer clips by it.
    """

    weights: dict[str, Shards]
    logits: Logits | None
    loss: float
    gradients: Shards
    grad_norm: float


def build(
    dense: Path | str,
    folding: ParallelFolding,
    upcycling: UpcyclingConfig,
    hooks: Iterable[Any] = (),
    wrap: bool = False,
    ddp: dict[str, Any] | None = None,
    **others: Any,
) -> Chunks:
    """Initialize Megatron's groups and build this rank's model as Megatron's training does."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**folding.parallel_sizes)
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    config = gpt_model_config(str(dense), upcycling, folding, **{"dtype": torch.float32, **others})
    config.pre_wrap_hooks.extend(hooks)
    config.finalize()
    return GPTModelBuilder(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True, **(ddp or {})),
        wrap_with_ddp=wrap,
    )


def prove(
    dense: Path, folding: ParallelFolding, ways: dict[str, Way], ids: torch.Tensor
) -> Evidence:
    """Upcycle in several ways and run one step, with one model; the step is of the last way."""
    *others, last = ways
    weights: dict[str, Shards] = {}

    def in_other_ways(built: Chunks) -> Chunks:
        for name in others:
            fill_with_nan(built)
            weights[name] = shards(_hook(ways[name])(built))
        fill_with_nan(built)
        return built

    hooks = (in_other_ways, _hook(ways[last]))
    models = build(dense, folding, UPCYCLING, hooks, wrap=True)
    chunks = [model.module for model in models]
    weights[last] = shards(chunks)
    step0 = logits(chunks, ids[:, :-1])
    make_experts_differ(chunks)
    loss, grad_norm = _step(models, ids)
    return Evidence(weights, step0, loss, gradients([model.module for model in models]), grad_norm)


def upcycled_logits(
    dense: Path,
    folding: ParallelFolding,
    upcycling: UpcyclingConfig,
    ids: torch.Tensor,
    breakage: str | None = None,
    **others: Any,
) -> Logits | None:
    """Upcycle and return the logits; `breakage` breaks the hook."""
    hook = upcycle(str(dense), upcycling)
    if breakage is not None:
        hook = getattr(broken, breakage)(hook)
    return logits(build(dense, folding, upcycling, [hook], **others), ids)


def norm_of_step(
    dense: Path,
    folding: ParallelFolding,
    ids: torch.Tensor,
    unmark_before: bool = False,
    unmark_after: bool = False,
) -> float:
    """Run a step and return the norm that the optimizer clips by.

    Args:
        dense: The dense checkpoint.
        folding: The mapping.
        ids: The global batch, with the last labels.
        unmark_before: Take the marks of experts off before the hook, as Transformer Engine from
            2.13 on leaves them.
        unmark_after: And after it, as if the hook did not set them.
    """
    hooks = [upcycle(str(dense), UPCYCLING)]
    if unmark_before:
        hooks.insert(0, broken.unmark_experts)
    if unmark_after:
        hooks.append(broken.unmark_experts)
    models = build(dense, folding, UPCYCLING, hooks, wrap=True)
    make_experts_differ([model.module for model in models])
    return _step(models, ids)[1]


def health(
    dense: Path, folding: ParallelFolding, upcycling: UpcyclingConfig, ids: torch.Tensor
) -> dict[str, float]:
    """Run forward and backward of a step, and return what `engine.health` measures of it."""
    models = build(dense, folding, upcycling, [upcycle(str(dense), upcycling)], wrap=True)
    chunks = [model.module for model in models]
    rows = rows_here(ids)
    data_parallel = parallel_state.get_data_parallel_world_size()
    init_num_microbatches_calculator(0, None, len(ids), 1, data_parallel)
    watcher = MoEHealth()
    watcher.start_watching(chunks, get_model_config(chunks[0]), upcycling)
    make_experts_differ(chunks)
    train_step(models, rows)  # which is not to be counted
    watcher.begin_interval()
    train_step(models, rows)
    found = watcher.measure().scalars()
    watcher.check_finite()
    watcher.stop_watching()
    return found


def without_global_groups(
    dense: Path,
    folding: ParallelFolding,
    upcycling: UpcyclingConfig,
    other: ParallelFolding | None,
) -> Shards:
    """Upcycle where Megatron's global state has no process groups, or those of another mapping."""

    def forget(chunks: Chunks) -> Chunks:
        parallel_state.destroy_model_parallel()
        if other is not None:
            parallel_state.initialize_model_parallel(**other.parallel_sizes)
        return chunks

    filled: Shards = []

    def show(chunks: Chunks) -> Chunks:
        filled.extend(shards(chunks))
        return chunks

    build(dense, folding, upcycling, [forget, upcycle(str(dense), upcycling), show])
    return filled


def weights(
    dense: str, folding: ParallelFolding, upcycling: UpcyclingConfig, **others: Any
) -> Shards:
    """Upcycle and return what this rank owns."""
    return shards(build(dense, folding, upcycling, [upcycle(dense, upcycling)], **others))


def error_of(
    dense: Path,
    folding: ParallelFolding,
    upcycling: UpcyclingConfig,
    arguments: dict[str, Any],
    model_of: Path | None = None,
    asked: UpcyclingConfig | None = None,
    **others: Any,
) -> str:
    """Build a model with a hook that has to fail; return what this rank is told."""
    from nemo_upcycle.errors import UpcyclingError

    try:
        hook = upcycle(str(dense), asked or upcycling, **arguments)
        build(model_of or dense, folding, upcycling, [hook], **others)
    except UpcyclingError as error:
        return str(error)
    return "no error"


def _hook(way: Way) -> Any:
    upcycling = replace(UPCYCLING, initializer=way.initializer)
    return upcycle(way.source, upcycling, read_once=way.read_once)


def saved(
    dense: Path, folding: ParallelFolding, upcycling: UpcyclingConfig, directory: Path
) -> None:
    """Upcycle and save Megatron's distributed checkpoint of the weights alone."""
    chunks = build(dense, folding, upcycling, [upcycle(str(dense), upcycling)])
    directory.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(sharded_state(chunks), str(directory))


def sharded_state(chunks: Chunks) -> dict[str, Any]:
    """Return a rank's weights as Megatron-LM names them in its checkpoints."""
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    return {name: chunk.sharded_state_dict() for name, chunk in zip(names, chunks, strict=True)}


def _step(models: Chunks, ids: torch.Tensor) -> tuple[float, float]:
    """Run one step on this rank's part of the batch; gradients are left reduced."""
    get_model_config(models[0]).finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=0.0), models)
    for model in models:
        model.zero_grad_buffer()
    loss = train_step(models, rows_here(ids))
    optimizer.prepare_grads()
    return loss, float(optimizer.get_grad_norm())

"""What checks do with a rank's Megatron-Core models, under any front end."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from nemo_upcycle.engine.owned_shards import OwnedShard, owned_shards
from nemo_upcycle.plans.rank import Shard

Chunks = list[torch.nn.Module]
"""A rank's model, one module per virtual stage."""

Shards = list[tuple[Shard, torch.Tensor]]
"""What a rank owns of the parameters: each shard's place, and its values."""

Logits = tuple[torch.Tensor, torch.Tensor]
"""Positions in the sequence [length/CP], and their logits [rows, length/CP, vocabulary]."""


def owned(chunks: Chunks) -> list[OwnedShard]:
    """Return what this rank owns."""
    return [own for chunk in chunks for own in owned_shards(chunk)]


def shards(chunks: Chunks) -> Shards:
    """Return what this rank owns, copied."""
    return copied(owned(chunks))


def copied(owned: Iterable[OwnedShard]) -> Shards:
    """Return a copy of shards as they are now."""
    return [(own.shard, own.data.clone()) for own in owned]


@torch.no_grad()
def fill_with_nan(chunks: Chunks) -> None:
    """Leave no value that what comes next could forget to write."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.fill_(float("nan"))


@torch.no_grad()
def make_experts_differ(chunks: Chunks) -> None:
    """Scale each expert by its number: while experts are equal, the router's gradient is 0."""
    for own in owned(chunks):
        if ".experts." in own.shard.name:
            own.data.mul_(1 + 0.05 * int(own.shard.name.split(".experts.")[1].split(".")[0]))


@torch.no_grad()
def gradients(chunks: Chunks) -> Shards:
    """Put each parameter's reduced gradient in its place and read it out by shard."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.copy_(parameter.main_grad)
    return shards(chunks)


def gathered_logits(
    chunks: Chunks,
    forward: Callable[[Any, Any], torch.Tensor],
    microbatches: Sequence[Any],
    length: int,
) -> torch.Tensor | None:
    """Return logits [rows, length/CP, vocabulary] on the last pipeline stage, None elsewhere.

    Args:
        chunks: The rank's models.
        forward: Runs the next of an iterator's microbatches, of one row each, through a model.
        microbatches: The microbatches.
        length: Tokens of a row.
    """

    def forward_step(data: Iterable[Any], model: Any) -> tuple[torch.Tensor, Any]:
        return forward(data, model), lambda output, non_loss_data: output

    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(microbatches) for _ in chunks],
            model=chunks,
            num_microbatches=len(microbatches),
            seq_length=length,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    for chunk in chunks:
        chunk.train()
    if not outputs:
        return None
    return tensor_parallel.gather_from_tensor_model_parallel_region(torch.cat(outputs))


def logits(chunks: Chunks, ids: torch.Tensor) -> Logits | None:
    """Return the logits of [rows, length] inputs on the last pipeline stage, None elsewhere."""
    positions = on_this_cp_rank(torch.arange(ids.shape[1], device=ids.device))

    def forward(data: Any, model: Any) -> torch.Tensor:
        return model(on_this_cp_rank(next(data))[None], positions[None], None)

    gathered = gathered_logits(chunks, forward, list(ids), ids.shape[1])
    return None if gathered is None else (positions, gathered)


def train_step(models: Chunks, rows: torch.Tensor) -> float:
    """Run forward and backward of this rank's rows; return its part of their mean loss."""
    losses = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=[iter(rows) for _ in models],
        model=models,
        num_microbatches=len(rows),
        seq_length=rows.shape[1] - 1,
        micro_batch_size=1,
        forward_only=False,
    )
    return sum(map(float, losses)) / len(rows)


def rows_here(ids: torch.Tensor) -> torch.Tensor:
    """Return this data-parallel rank's rows of a global batch."""
    group = parallel_state.get_data_parallel_group()
    return ids.chunk(group.size())[group.rank()]


def on_this_cp_rank(row: torch.Tensor) -> torch.Tensor:
    """Return the chunks of a sequence [length] that this context-parallel rank has."""
    group = parallel_state.get_context_parallel_group()
    chunks = row.chunk(2 * group.size())
    return (
        row if group.size() == 1 else torch.cat((chunks[group.rank()], chunks[-1 - group.rank()]))
    )


def _forward_step(data: Any, model: Any) -> tuple[torch.Tensor, Any]:
    """Run a microbatch of one row [length + 1]; the loss is a mean over its tokens."""
    row = next(data)
    inputs, labels = on_this_cp_rank(row[:-1])[None], on_this_cp_rank(row[1:])[None]
    positions = on_this_cp_rank(torch.arange(len(row) - 1, device=row.device))[None]
    losses = model(inputs, positions, None, labels=labels)

    def loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = losses.float().sum() / (len(row) - 1)  # this rank's part of it
        return mean, mean.detach().clone()

    return losses, loss


def distributed_optimizer(
    chunks: Chunks, bf16: bool = False, lr: float = 1e-3, **ddp: Any
) -> tuple[Chunks, Any]:
    """Return a rank's models in Megatron's DDP, with its distributed optimizer.

    Args:
        chunks: The models.
        bf16: Whether the parameters are in bf16.
        lr: The learning rate.
        ddp: Further fields of Megatron's `DistributedDataParallelConfig`.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, **ddp
    )
    models: Chunks = [DistributedDataParallel(get_model_config(c), ddp_config, c) for c in chunks]
    config = OptimizerConfig(lr=lr, bf16=bf16, use_distributed_optimizer=True)
    return models, get_megatron_optimizer(config, models)

"""What tests do with a rank's Megatron-Core models, under either stack; no NeMo."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
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
    return [(own.shard, own.data.clone()) for own in owned(chunks)]


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


def distributed_optimizer(chunks: Chunks, bf16: bool = False) -> tuple[Chunks, Any]:
    """Return a rank's models in Megatron's DDP, with its distributed optimizer."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True
    )
    models = [DistributedDataParallel(get_model_config(c), ddp_config, c) for c in chunks]
    config = OptimizerConfig(lr=1e-3, bf16=bf16, use_distributed_optimizer=True)
    return models, get_megatron_optimizer(config, models)

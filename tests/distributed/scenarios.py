"""What the ranks of a test do. Runs inside the processes of `RankPool`."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from nemo_upcycle import cpu, load
from nemo_upcycle.checkpoint import HuggingFaceCheckpoint
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.mapping import Architecture, family_of
from nemo_upcycle.model import UpcycledLlamaConfig, architecture_fields, moe_fields


def build(
    dense: Path, folding: ParallelFolding, upcycling: UpcyclingConfig, **overrides: Any
) -> list[torch.nn.Module]:
    """Build this rank's model for a dense checkpoint, one module a virtual stage."""
    hf_config = HuggingFaceCheckpoint(dense).config
    arch = family_of(hf_config).architecture(hf_config)
    return build_from(arch, folding, upcycling, **overrides)


def build_from(
    arch: Architecture, folding: ParallelFolding, upcycling: UpcyclingConfig, **overrides: Any
) -> list[torch.nn.Module]:
    """Initialise Megatron's groups and build this rank's model."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=folding.tensor_model_parallel_size,
        pipeline_model_parallel_size=folding.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=folding.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=folding.expert_model_parallel_size,
        expert_tensor_parallel_size=folding.expert_tensor_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    fields: dict[str, Any] = {
        **architecture_fields(arch),
        **moe_fields(arch, upcycling),
        **cpu.MODEL_OVERRIDES,
        **vars(folding),
        "sequence_parallel": folding.sequence_parallel,
        "seq_length": arch.max_position_embeddings,
        "pipeline_dtype": torch.float32,
        "transformer_layer_spec": cpu.cpu_layer_spec,
        # It depends on how a batch is split, so gradients would.
        "moe_aux_loss_coeff": 0.0,
        "make_vocab_size_divisible_by": 1,
    }
    config = UpcycledLlamaConfig(**(fields | overrides))
    stages = folding.virtual_pipeline_model_parallel_size
    return [
        config.configure_model(tokenizer=None, vp_stage=None if stages is None else stage)
        for stage in range(stages or 1)
    ]


def upcycled(
    dense: Path, folding: ParallelFolding, upcycling: UpcyclingConfig, **overrides: Any
) -> list[torch.nn.Module]:
    """Build the model and fill it."""
    chunks = build(dense, folding, upcycling, **overrides)
    load.upcycle(chunks, HuggingFaceCheckpoint(dense), upcycling)
    return chunks


def _batch(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    length = ids.shape[1]
    future = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
    return {
        "input_ids": ids,
        "position_ids": torch.arange(length).expand_as(ids),
        "attention_mask": future[None, None],
    }


def logits(chunks: list[torch.nn.Module], ids: torch.Tensor) -> torch.Tensor | None:
    """Return [rows, length, vocabulary] logits on the last pipeline stage, None elsewhere."""

    def forward_step(data: Any, model: Any) -> tuple[torch.Tensor, Any]:
        output = model(**_batch(next(data)))
        return output, lambda output, non_loss_data: output

    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(ids.split(1)) for _ in chunks],
            model=chunks,
            num_microbatches=len(ids),
            seq_length=ids.shape[1],
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not outputs:
        return None
    return tensor_parallel.gather_from_tensor_model_parallel_region(torch.cat(outputs))


def step0_logits(
    dense: Path,
    folding: ParallelFolding,
    upcycling: UpcyclingConfig,
    ids: torch.Tensor,
    damage: str | None = None,
) -> torch.Tensor | None:
    """Upcycle and return the logits; `damage` breaks the weights as a wrong loader would."""
    chunks = upcycled(dense, folding, upcycling)
    if damage is not None:
        _damage(chunks, damage)
    return logits(chunks, ids)


@torch.no_grad()
def _damage(chunks: list[torch.nn.Module], damage: str) -> None:
    for own in (own for chunk in chunks for own in load.owned_shards(chunk)):
        fc1 = own.shard.name.endswith("linear_fc1.weight")
        if damage == "zero expert 1" and ".experts.1." in own.shard.name:
            own.data.zero_()
        elif damage == "swap gate and up" and fc1 and own.shard.offset[0] == 0:
            gate, count = own.data, own.data.shape[0]
            up = torch.as_strided(
                gate, gate.shape, gate.stride(), gate.storage_offset() + count * gate.shape[1]
            )
            saved = gate.clone()
            gate.copy_(up)
            up.copy_(saved)


def weights(
    dense: Path, folding: ParallelFolding, upcycling: UpcyclingConfig
) -> dict[str, tuple[Any, torch.Tensor]]:
    """Upcycle and return what this rank owns: (name, offset) → shard and values."""
    owned = [
        own for chunk in upcycled(dense, folding, upcycling) for own in load.owned_shards(chunk)
    ]
    return {f"{o.shard.name}@{o.shard.offset}": (o.shard, o.data.clone()) for o in owned}


def random_experts(
    dense: Path, folding: ParallelFolding, upcycling: UpcyclingConfig
) -> dict[str, torch.Tensor]:
    """Build without upcycling and return the experts' random weights by global name."""
    return {
        own.shard.name + str(own.shard.offset): own.data.clone()
        for chunk in build(dense, folding, upcycling)
        for own in load.owned_shards(chunk)
        if ".experts." in own.shard.name
    }


def loss_and_gradients(
    dense: Path, folding: ParallelFolding, upcycling: UpcyclingConfig, ids: torch.Tensor
) -> tuple[list[float], list[tuple[Any, torch.Tensor]]]:
    """Run one step on this rank's part of the batch, with Megatron's own gradient reduction.

    Returns:
        The losses of its microbatches of one row (empty but on the last stage), and its shards
        with their reduced gradients.
    """
    chunks = upcycled(dense, folding, upcycling)
    _make_experts_differ(chunks)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    models = [DistributedDataParallel(get_model_config(c), ddp_config, c) for c in chunks]
    config = get_model_config(chunks[0])
    config.finalize_model_grads_func = finalize_model_grads
    rank = parallel_state.get_data_parallel_rank()
    local = ids.chunk(parallel_state.get_data_parallel_world_size())[rank]
    for model in models:
        model.zero_grad_buffer()
    losses = get_forward_backward_func()(
        forward_step_func=_language_model_step,
        data_iterator=[iter(local.split(1)) for _ in models],
        model=models,
        num_microbatches=len(local),
        seq_length=ids.shape[1] - 1,
        micro_batch_size=1,
        forward_only=False,
    )
    return [float(loss["loss"]) for loss in losses], _gradients(chunks)


@torch.no_grad()
def _make_experts_differ(chunks: list[torch.nn.Module]) -> None:
    """Scale each expert by its number: while experts are equal, the router's gradient is 0."""
    for own in (own for chunk in chunks for own in load.owned_shards(chunk)):
        if ".experts." in own.shard.name:
            own.data.mul_(1 + 0.05 * int(own.shard.name.split(".experts.")[1].split(".")[0]))


def _language_model_step(data: Any, model: Any) -> tuple[torch.Tensor, Any]:
    ids = next(data)
    output = model(**_batch(ids[:, :-1]), labels=ids[:, 1:])
    return output, _mean_loss


def _mean_loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = output.float().mean()
    # A copy, because the schedule divides the loss in place.
    return loss, {"loss": loss.detach().clone()}


def _gradients(chunks: list[torch.nn.Module]) -> list[tuple[Any, torch.Tensor]]:
    """Put each parameter's reduced gradient in its place and read it out by shard."""
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    return [(own.shard, own.data.clone()) for chunk in chunks for own in load.owned_shards(chunk)]

"""What the ranks of a test do. Runs inside the processes of `RankPool`."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank, get_model_config
from nemo.collections.llm.gpt.model.base import gpt_data_step, gpt_forward_step
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

from nemo_upcycle.check.models import (
    Chunks,
    Logits,
    Shards,
    copied,
    fill_with_nan,
    gathered_logits,
    gradients,
    make_experts_differ,
    owned,
    shards,
)
from nemo_upcycle.checkpoint import open_checkpoint
from nemo_upcycle.checkpoint.branches import open_branches
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.engine import cpu, load
from nemo_upcycle.families import Architecture, architecture_of
from nemo_upcycle.families.fields import moe_fields, window_fields
from nemo_upcycle.nemo.model import UpcycledGPTConfig, architecture_fields


@dataclass(frozen=True)
class Evidence:
    """What one rank shows of upcycling and a step of training.

    Attributes:
        weights: What it owns after upcycling, by way of upcycling.
        logits: At step 0; None but on the last pipeline stage.
        loss: Summed over the tokens, and their number; 0, 0 but on the last pipeline stage.
        gradients: Of what it owns.
        grad_norm: All gradients' norm, as the optimizer clips by it.
    """

    weights: dict[str, Shards]
    logits: Logits | None
    loss: torch.Tensor
    gradients: Shards
    grad_norm: float


def build(
    dense: Path, folding: ParallelFolding, upcycling: UpcyclingConfig, **overrides: Any
) -> Chunks:
    """Build this rank's model for a dense checkpoint."""
    hf_config = open_checkpoint(str(dense)).config
    arch = architecture_of(hf_config)
    return build_from(arch, folding, upcycling, **overrides)


def build_from(
    arch: Architecture, folding: ParallelFolding, upcycling: UpcyclingConfig, **overrides: Any
) -> Chunks:
    """Initialize Megatron's groups and build this rank's model."""
    if parallel_state.model_parallel_is_initialized():  # for another model, which keeps its groups
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**folding.parallel_sizes)
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    fields: dict[str, Any] = {
        **architecture_fields(arch),
        **window_fields(arch, arch.max_position_embeddings),
        **moe_fields(arch, upcycling),
        **cpu.MODEL_OVERRIDES,
        **folding.strategy_arguments,
        "seq_length": arch.max_position_embeddings,
        "pipeline_dtype": torch.float32,
        "transformer_layer_spec": cpu.cpu_layer_spec,
        # It depends on how a batch is split, so gradients would.
        "moe_aux_loss_coeff": 0.0,
        "make_vocab_size_divisible_by": 1,
    }
    config = UpcycledGPTConfig(**(fields | overrides))
    stages = folding.virtual_pipeline_model_parallel_size
    return [
        config.configure_model(tokenizer=None, vp_stage=None if stages is None else stage)
        for stage in range(stages or 1)
    ]


def upcycled(
    dense: Path, folding: ParallelFolding, upcycling: UpcyclingConfig, **overrides: Any
) -> Chunks:
    """Build the model and fill it."""
    chunks = build(dense, folding, upcycling, **overrides)
    load.fill(chunks, open_checkpoint(str(dense)), upcycling)
    return chunks


@dataclass(frozen=True)
class Way:
    """A way to upcycle.

    Attributes:
        source: Dense checkpoint, or several.
        read_once: Whether to read it once.
        upcycling: What is other than usual of the upcycling.
    """

    source: str
    read_once: bool = False
    upcycling: dict[str, Any] = field(default_factory=dict)


def prove(
    dense: Path,
    folding: ParallelFolding,
    upcycling: UpcyclingConfig,
    ways: dict[str, Way],
    ids: torch.Tensor,
    save_to: Path,
) -> Evidence:
    """Upcycle in several ways, save, and run one step, with one model.

    Args:
        dense: Hugging Face checkpoint that the model is built for.
        folding: The mapping.
        upcycling: What the feed-forward layers become.
        ways: By name, how to upcycle; what follows is done with the last.
        ids: Inputs of the global batch and the last labels, [rows, length + 1].
        save_to: Directory for Megatron's distributed checkpoint.
    """
    chunks = build(dense, folding, upcycling)
    mine, weights = owned(chunks), {}
    for name, way in ways.items():
        fill_with_nan(chunks)
        chosen = replace(upcycling, **way.upcycling)
        load.fill_shards(mine, open_branches(way.source), chosen, read_once=way.read_once)
        weights[name] = copied(mine)
    _save(chunks, save_to)
    step0 = logits(chunks, ids[:, :-1])
    make_experts_differ(chunks)
    loss, grad_norm = _step(chunks, ids)
    return Evidence(weights, step0, loss, gradients(chunks), grad_norm)


def upcycled_step(
    dense: Path, folding: ParallelFolding, upcycling: UpcyclingConfig, ids: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Upcycle, make the experts differ and run one step; see `_step`."""
    chunks = upcycled(dense, folding, upcycling)
    make_experts_differ(chunks)
    return _step(chunks, ids)


def step0_logits(
    dense: Path,
    folding: ParallelFolding,
    upcycling: UpcyclingConfig,
    ids: torch.Tensor,
    damage: str | None = None,
) -> Logits | None:
    """Upcycle and return the logits; `damage` breaks the weights as a wrong loader would."""
    chunks = upcycled(dense, folding, upcycling)
    if damage is not None:
        _damage(chunks, damage)
    return logits(chunks, ids)


def weights(dense: Path, folding: ParallelFolding, upcycling: UpcyclingConfig) -> Shards:
    """Upcycle and return what this rank owns."""
    return shards(upcycled(dense, folding, upcycling))


def upcycled_and_saved(
    dense: Path, folding: ParallelFolding, upcycling: UpcyclingConfig, directory: Path
) -> None:
    """Upcycle and save a distributed checkpoint."""
    _save(upcycled(dense, folding, upcycling), directory)


def trained_and_saved(
    dense: Path,
    folding: ParallelFolding,
    upcycling: UpcyclingConfig,
    directory: Path,
    ids: torch.Tensor,
) -> Logits | None:
    """Upcycle, change all weights as training would, save as NeMo 2 does; return the logits."""
    chunks = upcycled(dense, folding, upcycling)
    with torch.no_grad():
        for own in owned(chunks):
            wave = torch.arange(own.data.numel()).view(own.data.shape) + sum(own.shard.offset)
            own.data.mul_(1 + 0.1 * torch.sin(wave + len(own.shard.name)))
            if "router" in own.shard.name:  # whose rows are equal in virtual groups
                own.data.add_(0.05 * torch.cos(wave))
    _save_as_nemo(chunks, directory)
    return logits(chunks, ids)


def upcycled_and_saved_as_nemo(
    dense: Path, folding: ParallelFolding, upcycling: UpcyclingConfig, directory: Path
) -> None:
    """Upcycle and save as NeMo 2 does."""
    _save_as_nemo(upcycled(dense, folding, upcycling), directory)


def _save_as_nemo(chunks: Chunks, directory: Path) -> None:
    _save(chunks, directory / "weights")
    if torch.distributed.get_rank() == 0:
        config = {
            name: _listed(value)
            for name, value in vars(get_model_config(chunks[0])).items()
            if isinstance(value, bool | int | float | str | list | tuple | None)
        }
        (directory / "context").mkdir()
        (directory / "context" / "model.yaml").write_text(yaml.safe_dump({"config": config}))


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def loaded(
    dense: Path, folding: ParallelFolding, upcycling: UpcyclingConfig, saved: Path
) -> Shards:
    """Build the model, load what another mapping saved, and return what this rank owns."""
    chunks = build(dense, folding, upcycling)
    fill_with_nan(chunks)
    state = dist_checkpointing.load(_sharded_state(chunks), saved)
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{index}"])
    return shards(chunks)


def random_experts(
    dense: Path, folding: ParallelFolding, upcycling: UpcyclingConfig
) -> dict[str, torch.Tensor]:
    """Build without upcycling and return the experts' random weights by global name."""
    return {
        own.shard.name + str(own.shard.offset): own.data.clone()
        for own in owned(build(dense, folding, upcycling))
        if ".experts." in own.shard.name
    }


def _save(chunks: Chunks, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(_sharded_state(chunks), directory)


def _sharded_state(chunks: Chunks) -> dict[str, Any]:
    return {f"model{index}": chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}


def _microbatches(inputs: torch.Tensor, labels: torch.Tensor) -> Sequence[dict[str, Any]]:
    """Return microbatches of one row, as NeMo's data have them without Transformer Engine."""
    length = inputs.shape[1]
    future = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
    return [
        {
            "tokens": row[None],
            "labels": label[None],
            "loss_mask": torch.ones(1, length),
            "position_ids": torch.arange(length)[None],
            "attention_mask": future[None, None],
        }
        for row, label in zip(inputs, labels, strict=True)
    ]


def logits(chunks: Chunks, ids: torch.Tensor) -> Logits | None:
    """Return the logits of [rows, length] inputs on the last pipeline stage, None elsewhere."""

    def forward(data: Any, model: Any) -> torch.Tensor:
        # Without a mask, attention is causal.
        return gpt_forward_step(
            model, {**gpt_data_step(data), "labels": None, "attention_mask": None}
        )

    gathered = gathered_logits(chunks, forward, _microbatches(ids, ids), ids.shape[1])
    if gathered is None:
        return None
    positions = get_batch_on_this_cp_rank({"positions": torch.arange(ids.shape[1])[None]})
    return positions["positions"][0], gathered


def _step(chunks: Chunks, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Run one step on this rank's part of the batch; gradients are left reduced.

    The data step, the forward step and the loss are NeMo's, the reduction is Megatron's.

    Returns:
        The loss, summed over tokens, with their number; and the gradients' norm.
    """
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    models = [DistributedDataParallel(get_model_config(c), ddp_config, c) for c in chunks]
    get_model_config(chunks[0]).finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=0.0), models)
    rank = parallel_state.get_data_parallel_rank()
    local = ids.chunk(parallel_state.get_data_parallel_world_size())[rank]
    for model in models:
        model.zero_grad_buffer()
    losses = get_forward_backward_func()(
        forward_step_func=_language_model_step,
        data_iterator=[iter(_microbatches(local[:, :-1], local[:, 1:])) for _ in models],
        model=models,
        num_microbatches=len(local),
        seq_length=ids.shape[1] - 1,
        micro_batch_size=1,
        forward_only=False,
    )
    optimizer.prepare_grads()
    loss = sum((each["loss_sum_and_ub_size"] for each in losses), start=torch.zeros(2))
    return loss, float(optimizer.get_grad_norm())


def _language_model_step(data: Any, model: Any) -> tuple[torch.Tensor, Any]:
    batch = gpt_data_step(data)
    return gpt_forward_step(model, batch), partial(MaskedTokenLossReduction().forward, batch)


@torch.no_grad()
def _damage(chunks: Chunks, damage: str) -> None:
    for own in owned(chunks):
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

"""The model of a check on this rank: built under a mapping, upcycled, run for a step."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from dataclasses import fields as fields_of
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_model_config

from nemo_upcycle.check.models import Chunks, distributed_optimizer, rows_here, train_step
from nemo_upcycle.check.process_groups import device
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.engine import cpu
from nemo_upcycle.engine.load import LoadReport, check_all_used, fill
from nemo_upcycle.engine.ranks import Ranks
from nemo_upcycle.engine.upcycling import Prepared, prepare
from nemo_upcycle.families import Architecture
from nemo_upcycle.megatron.model import FinishModel, described, model_fields, with_rope_of

LENGTH = 128
"""Tokens per row: 2·CP chunks of CP 8, each divisible by TP."""

STEP0_ROWS = 4
"""Rows of which logits are compared; a multiple of all numbers of pipeline stages."""

UPCYCLING = UpcyclingConfig(moe_aux_loss_coeff=0.0)
"""The auxiliary loss depends on how a batch is split, so gradients would."""


@dataclass(frozen=True)
class Tolerance:
    """Allowed differences, relative.

    Attributes:
        logits: Of the largest logit of the dense model.
        loss: Of the loss of one rank.
        norm: Of the gradient norm of one rank.
        resumed: Of a loss of the run that was not killed.
    """

    logits: float
    loss: float
    norm: float
    resumed: float


ON_CPU = Tolerance(logits=1e-5, loss=1e-5, norm=1e-5, resumed=0.0)
ON_GPU = {
    torch.float32: Tolerance(logits=1e-3, loss=1e-3, norm=1e-2, resumed=1e-4),  # TF32
    torch.bfloat16: Tolerance(logits=0.05, loss=1e-2, norm=5e-2, resumed=1e-2),
}
"""For the logits as in `tests/distributed/test_gpu.py`; the others are set by hand."""


@dataclass(frozen=True)
class Subject:
    """A dense model, and what it becomes.

    Attributes:
        dense: Directory of the dense model.
        dtype: dtype of the MoE's parameters.
        upcycling: What the feed-forward layers become: equal experts, exact at step 0.
    """

    dense: Path
    dtype: torch.dtype = torch.float32
    upcycling: UpcyclingConfig = UPCYCLING

    @property
    def varied(self) -> UpcyclingConfig:
        """The upcycling to experts that differ, so that their order shows."""
        return replace(self.upcycling, initializer="noise")

    @cached_property
    def prepared(self) -> Prepared:
        """The dense model, opened by headers."""
        return prepare(str(self.dense), self.upcycling)

    @property
    def architecture(self) -> Architecture:
        """The dense model's architecture."""
        return self.prepared.checkpoint.architecture

    @property
    def tolerance(self) -> Tolerance:
        """Allowed differences on this device."""
        return ON_GPU[self.dtype] if torch.cuda.is_available() else ON_CPU

    def ids(self, rows: int, seed: int = 1) -> torch.Tensor:
        """Return random tokens [rows, LENGTH + 1], the same on all ranks."""
        generator = torch.Generator().manual_seed(seed)
        shape = (rows, LENGTH + 1)
        ids = torch.randint(0, self.architecture.vocab_size, shape, generator=generator)
        return ids.to(device())

    def fields(self, folding: ParallelFolding) -> dict[str, Any]:
        """Return the model under a mapping in Megatron's fields, as this machine runs it."""
        machine: dict[str, Any] = cpu.MODEL_OVERRIDES
        if torch.cuda.is_available():
            machine = {"moe_grouped_gemm": True, "moe_permute_fusion": True}
        arch = self.architecture
        return model_fields(arch, self.upcycling, folding, self.dtype, LENGTH) | machine


def build(subject: Subject, folding: ParallelFolding) -> Chunks:
    """Build this rank's models with random weights, after `make_groups`; no rank waits."""
    fields = subject.fields(folding)
    of_config = {field.name for field in fields_of(TransformerConfig)}
    config = TransformerConfig(**{name: fields[name] for name in fields.keys() & of_config})
    stages = folding.virtual_pipeline_model_parallel_size
    chunks: Chunks = [
        _chunk(config, fields, stage).to(device(), subject.dtype)
        for stage in (range(stages) if stages else [None])
    ]
    upcycling = subject.upcycling
    finish = FinishModel(
        subject.architecture, upcycling.router_logit_normalization, upcycling.router_dense_gradient
    )
    return finish(chunks)


def _chunk(
    config: TransformerConfig, fields: Mapping[str, Any], vp_stage: int | None
) -> torch.nn.Module:
    spec = (
        get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
        if torch.cuda.is_available()
        else cpu.cpu_layer_spec(config, vp_stage)
    )
    stage = {"ignore_virtual": False, "vp_stage": vp_stage}
    return GPTModel(
        config,
        spec,
        vocab_size=fields["vocab_size"],
        max_sequence_length=fields["seq_length"],
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        share_embeddings_and_output_weights=fields["share_embeddings_and_output_weights"],
        position_embedding_type="rope",
        rotary_percent=fields["rotary_percent"],
        rotary_base=fields["rotary_base"],
        seq_len_interpolation_factor=fields["seq_len_interpolation_factor"],
        vp_stage=vp_stage,
    )


def fill_all(
    chunks: Chunks, subject: Subject, ranks: Ranks, upcycling: UpcyclingConfig | None = None
) -> None:
    """Fill this rank's models from the dense model; every rank must call this.

    Args:
        chunks: The rank's models.
        subject: The dense model.
        ranks: The job's ranks.
        upcycling: What its feed-forward layers become; None takes the subject's.
    """
    prepared = subject.prepared

    def fill_here() -> LoadReport:
        prepared.check_model(with_rope_of(described(chunks, 128), chunks, subject.architecture))
        return fill(chunks, prepared.checkpoint, upcycling or subject.upcycling)

    check_all_used(prepared.checkpoint, ranks.gather(ranks.on_all(fill_here)))


def trainer(chunks: Chunks, subject: Subject, lr: float) -> tuple[Chunks, Any]:
    """Wrap models for training; return them with Megatron's distributed optimizer."""
    get_model_config(chunks[0]).finalize_model_grads_func = finalize_model_grads
    return distributed_optimizer(chunks, subject.dtype == torch.bfloat16, lr)


def step(models: Chunks, optimizer: Any, ids: torch.Tensor) -> float | None:
    """Run forward and backward of a global batch [rows, LENGTH + 1].

    Returns:
        The mean loss of all rows on the last pipeline stage, None elsewhere.
    """
    for model in models:
        model.zero_grad_buffer()
    optimizer.zero_grad()
    part = train_step(models, rows_here(ids))
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    total = torch.tensor(part, device=ids.device, dtype=torch.float64)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(total, group=group)
    return float(total) / parallel_state.get_data_parallel_world_size()

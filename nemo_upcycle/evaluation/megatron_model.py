"""A Megatron model with the interface of transformers (`forward`, `generate`), for lm-eval.

All ranks call the model with the same rows and get the same logits. Rows are split over
data-parallel ranks; the model is split over pipeline stages and tensor-parallel ranks.

Legend of the shapes: R rows, L tokens per row, K positions kept per row, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from nemo_upcycle.families import Architecture


class MegatronConfig(PretrainedConfig):
    """The config fields that transformers requires."""

    model_type = "megatron"


class MegatronForCausalLM(PreTrainedModel, GenerationMixin):
    """A Megatron-Core model with the interface of transformers.

    Args:
        chunks: This rank's modules.
        arch: The model's architecture.
    """

    config_class = MegatronConfig

    def __init__(self, chunks: Sequence[torch.nn.Module], arch: Architecture) -> None:
        super().__init__(
            MegatronConfig(
                vocab_size=arch.vocab_size,
                hidden_size=arch.hidden_size,
                num_hidden_layers=arch.num_layers,
                num_attention_heads=arch.num_attention_heads,
                num_key_value_heads=arch.num_query_groups,
                head_dim=arch.kv_channels,
                max_position_embeddings=arch.max_position_embeddings,
                tie_word_embeddings=False,  # Megatron has already tied the embeddings
            )
        )
        self.chunks = torch.nn.ModuleList(chunks)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """Return the arguments of `forward` for the next token; there is no key-value cache."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutput:
        """Compute logits in fp32.

        Args:
            input_ids: [R, L], equal on all ranks; padded on the right, or on the left with a mask.
            attention_mask: [R, L], 0 at padding on the left.
            logits_to_keep: Number of last positions with logits, 0 for all.

        Returns:
            Logits [R, K, V].
        """
        rows, length = input_ids.shape
        kept = torch.arange(length, device=input_ids.device)[-logits_to_keep:].expand(rows, -1)
        if attention_mask is not None:
            # Causal attention ignores padding on the right: shift each row to the left.
            padding = (attention_mask.cumsum(1) == 0).sum(1, keepdim=True)
            places = torch.arange(length, device=input_ids.device) + padding
            input_ids = input_ids.gather(1, places % length)
            kept = (kept - padding).clamp(min=0)
        return CausalLMOutput(logits=self._logits(input_ids, kept))

    def _logits(self, ids_RL: torch.Tensor, kept_RK: torch.Tensor) -> torch.Tensor:
        group = parallel_state.get_data_parallel_group()
        size, rank = group.size(), group.rank()
        rows = len(ids_RL)
        ids_RL, kept_RK = _pad(ids_RL, 0, size), _pad(kept_RK, 0, size)
        # Sequence parallelism splits rows over the tensor-parallel ranks.
        ids_RL = _pad(ids_RL, 1, parallel_state.get_tensor_model_parallel_world_size())
        local = _forward(list(self.chunks), ids_RL.chunk(size)[rank])
        logits_RKV = self._on_all_stages(local, kept_RK.chunk(size)[rank])
        if size == 1:
            return logits_RKV
        gathered = [torch.empty_like(logits_RKV) for _ in range(size)]
        torch.distributed.all_gather(gathered, logits_RKV, group=group)
        return torch.cat(gathered)[:rows]

    def _on_all_stages(self, outputs: list[torch.Tensor], kept_RK: torch.Tensor) -> torch.Tensor:
        """Broadcast the kept logits from the last pipeline stage to all stages."""
        vocab = self.config.vocab_size
        if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            index = kept_RK[..., None]
            local_RLV = torch.cat(outputs)
            local_RKV = local_RLV.gather(1, index.expand(-1, -1, local_RLV.shape[2]))
            logits = gather_from_tensor_model_parallel_region(local_RKV)[..., :vocab].float()
            logits = logits.contiguous()
        else:
            logits = torch.empty(*kept_RK.shape, vocab, device=kept_RK.device)
        group = parallel_state.get_pipeline_model_parallel_group()
        if group.size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast(logits, last, group=group)
        return logits


def _pad(values: torch.Tensor, axis: int, multiple: int) -> torch.Tensor:
    """Append zeros so that the axis is divisible by `multiple`."""
    shape = list(values.shape)
    shape[axis] = -shape[axis] % multiple
    return torch.cat((values, values.new_zeros(shape)), axis) if shape[axis] else values


def _forward(chunks: list[torch.nn.Module], ids_RL: torch.Tensor) -> list[torch.Tensor]:
    """Run the pipeline; return logits [R, L, V/TP] per microbatch, only on the last stage."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    microbatches = ids_RL.chunk(stages) if len(ids_RL) % stages == 0 else (ids_RL,)
    positions_L = torch.arange(ids_RL.shape[1], device=ids_RL.device)

    def step(data: Any, model: Any) -> tuple[torch.Tensor, Any]:
        ids = next(data)
        # Without a mask, attention is causal.
        output = model(ids, positions_L.expand_as(ids), attention_mask=None)
        return output, lambda output, non_loss_data: output

    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(microbatches) for _ in chunks],
        model=chunks,
        num_microbatches=len(microbatches),
        seq_length=ids_RL.shape[1],
        micro_batch_size=len(microbatches[0]),
        forward_only=True,
        collect_non_loss_data=True,
    )

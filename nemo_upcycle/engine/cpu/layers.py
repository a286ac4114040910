"""Megatron-Core's layers built from modules that run on CPU, with Transformer Engine's names."""

import copy
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from nemo_upcycle.config.layers import moe_layers
from nemo_upcycle.engine.cpu.patches import enable

MODEL_OVERRIDES: dict[str, Any] = {
    # Each fusion is a CUDA kernel, or needs Transformer Engine or Apex.
    "apply_rope_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "cross_entropy_loss_fusion": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    # Grouped GEMM needs Transformer Engine or grouped_gemm.
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    # gloo may still be sending an output when the schedule frees its memory.
    "deallocate_pipeline_outputs": False,
}
"""Fields of a model config that must be off on CPU."""


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm, by config, that works with Megatron's sequence parallelism."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        self.config, self.eps = config, eps
        self.weight, self.bias = _norm_parameters(config, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _normalize(x, self.weight, self.bias, self.config, self.eps)


class NormColumnParallelLinear(ColumnParallelLinear):
    """Fused norm and column-parallel linear, as in Transformer Engine.

    Parameters have Transformer Engine's names (`linear_qkv.layer_norm_weight`), so that
    checkpoints are portable between CPU and GPU, and NeMo's importers and exporters work.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight, self.layer_norm_bias = _norm_parameters(config, input_size)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        x = _normalize(
            x,
            self.layer_norm_weight,
            self.layer_norm_bias,
            self.config,
            self.config.layernorm_epsilon,
        )
        return super().forward(x, *args, **kwargs)


def _norm_parameters(
    config: TransformerConfig, size: int
) -> tuple[torch.nn.Parameter, torch.nn.Parameter | None]:
    """Return a norm's initial weight, and for LayerNorm the initial bias."""
    start = torch.zeros if config.layernorm_zero_centered_gamma else torch.ones
    weight = torch.nn.Parameter(start(size, dtype=config.params_dtype))
    bias = None
    if config.normalization == "LayerNorm":
        bias = torch.nn.Parameter(torch.zeros(size, dtype=config.params_dtype))
    for parameter in filter(lambda each: each is not None, (weight, bias)):
        # Megatron all-reduces the gradients of parameters with this mark over the TP group.
        parameter.sequence_parallel = config.sequence_parallel
    return weight, bias


def _normalize(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    config: TransformerConfig,
    eps: float,
) -> torch.Tensor:
    if bias is None and config.layernorm_zero_centered_gamma:
        # In fp32 as in transformers and Transformer Engine: the weight plus 1 is not rounded.
        normal = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], weight.float() + 1, eps)
        return normal.to(x.dtype)
    if bias is None:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)
    if config.layernorm_zero_centered_gamma:
        weight = weight + 1
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


class CpuAttention(DotProductAttention):
    """Megatron's attention with features that Megatron leaves to Transformer Engine.

    Context parallelism: this rank's queries attend to the keys and values of all CP ranks. A
    sequence is cut into 2·CP chunks; rank i has the chunks i and 2·CP-1-i. The sliding window also
    applies if the data bring a mask.
    """

    def __init__(
        self, config: TransformerConfig, *args: Any, pg_collection: Any, **kwargs: Any
    ) -> None:
        self.cp_group, self.window = pg_collection.cp, config.window_size
        config = copy.copy(config)
        config.context_parallel_size = 1  # Megatron's attention refuses other sizes
        config.window_size = None  # and does not add a window to a mask
        super().__init__(config, *args, pg_collection=pg_collection, **kwargs)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend from [length/CP, rows, heads, size]; the mask has this rank's rows."""
        queries, keys = self._positions(len(query))
        if attention_mask is None:
            attention_mask = keys > queries[:, None]
        if self.window is not None:
            attention_mask = attention_mask | (keys < queries[:, None] - self.window[0])
        return super().forward(
            query, self._gather(key), self._gather(value), attention_mask, **kwargs
        )

    def _gather(self, local: torch.Tensor) -> torch.Tensor:
        """Gather the whole sequence; gradients are summed and scattered back to the ranks."""
        if self.cp_group.size() == 1:
            return local
        gathered = gather_from_sequence_parallel_region(local, group=self.cp_group)
        chunks = gathered.chunk(2 * self.cp_group.size())
        return torch.cat(chunks[::2] + chunks[1::2][::-1])

    def _positions(self, local_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the positions of this rank's queries and of all keys."""
        size, rank = self.cp_group.size(), self.cp_group.rank()
        positions = torch.arange(size * local_length)
        if size == 1:
            return positions, positions
        chunks = positions.chunk(2 * size)
        return torch.cat((chunks[rank], chunks[-1 - rank])), positions


class CpuSpecProvider(LocalSpecProvider):
    """Megatron's local modules with the norm fused into the linear layer that follows."""

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return NormColumnParallelLinear

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> type:
        return Norm


def cpu_layer_spec(
    config: TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Build the layers of one pipeline stage from modules that run on CPU.

    Args:
        config: The model's config.
        vp_stage: Virtual pipeline stage, None without virtual stages.

    Returns:
        The stage's layers, with Transformer Engine's parameter names.
    """
    enable()
    experts = config.num_moe_experts
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    is_moe = [False] * config.num_layers
    if experts is not None:
        is_moe = list(moe_layers(config.moe_layer_freq, config.num_layers))
    specs = {moe: _layer(config, experts if moe else None) for moe in set(is_moe)}
    return TransformerBlockSubmodules(
        layer_specs=[specs[moe] for moe in is_moe[first : first + count]], layer_norm=Norm
    )


def _layer(config: TransformerConfig, experts: int | None) -> ModuleSpec:
    """Build an MoE layer, or a dense one for None."""
    backend = CpuSpecProvider()
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=_self_attention(backend, config),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backend.layer_norm() if experts else IdentityOp,
            mlp=get_mlp_module_spec_for_backend(
                backend=backend, num_experts=experts, moe_grouped_gemm=False
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _self_attention(backend: BackendSpecProvider, config: TransformerConfig) -> ModuleSpec:
    plain = config.context_parallel_size == 1 and config.window_size is None
    head_norm = backend.layer_norm(for_qk=True) if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_layer_norm_linear(),
            core_attention=backend.core_attention() if plain else CpuAttention,
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )

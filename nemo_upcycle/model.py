"""The NeMo model: a dense Llama whose feed-forward layers became Mixture-of-Experts layers."""

from dataclasses import dataclass
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel as MCoreGPTModel
from nemo.collections.llm.gpt.model.base import GPTModel
from nemo.collections.llm.gpt.model.llama import LlamaConfig, apply_rope_scaling

from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.mapping import Architecture


@dataclass
class UpcycledLlamaConfig(LlamaConfig):
    """A Llama with experts: attention, RoPE scaling and vocabulary of the dense model.

    The fields are Megatron's and NeMo's. `scale_factor`, `low_freq_factor`, `high_freq_factor`
    and `old_context_len` are Llama 3.1's RoPE scaling, as in NeMo's Llama31Config; a
    `scale_factor` of None means none.

    With `num_moe_experts=None` this is the dense Llama itself.
    """

    num_moe_experts: int | None = 8
    moe_router_topk: int = 2
    moe_router_pre_softmax: bool = False
    moe_router_load_balancing_type: str = "aux_loss"
    # arXiv 2410.07524 finds 1e-2 best; 2412.09952 does not state its own.
    moe_aux_loss_coeff: float = 1e-2
    moe_token_dispatcher_type: str = "alltoall"
    # Routing decides by small differences; Megatron's default is the activations' dtype.
    moe_router_dtype: str | None = "fp32"

    scale_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    old_context_len: int = 8192

    def configure_model(
        self,
        tokenizer: Any,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> MCoreGPTModel:
        """Build this rank's Megatron-Core model."""
        if self.vocab_size is not None:
            # NeMo takes a given vocabulary as it is; Megatron wants it to divide by TP.
            self.vocab_size += -self.vocab_size % self.tensor_model_parallel_size
        if self.pipeline_model_parallel_size == 2 and self.virtual_pipeline_model_parallel_size:
            # The next stage and the previous one are the same rank. Megatron would take what comes
            # from one for what comes from the other, unless it sends to each by itself.
            self.overlap_p2p_comm, self.batch_p2p_comm = True, False
        model = super().configure_model(tokenizer, pre_process, post_process, vp_stage)
        _reduce_experts_over_their_own_group(model)
        if self.scale_factor is not None:
            model.rotary_pos_emb.inv_freq = apply_rope_scaling(
                model.rotary_pos_emb.inv_freq,
                factor=self.scale_factor,
                low_freq_factor=self.low_freq_factor,
                high_freq_factor=self.high_freq_factor,
                old_context_len=self.old_context_len,
            )
        return model


def _reduce_experts_over_their_own_group(model: MCoreGPTModel) -> None:
    """Mark all experts' parameters for the expert-data-parallel gradient reduction.

    Megatron does so only for EP > 1. With EP 1 and ETP ≠ TP the data-parallel groups of attention
    and experts differ all the same, and experts would train on part of their gradients
    (NVIDIA/Megatron-LM#1628).
    """
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False


class UpcycledLlamaModel(GPTModel):
    """A Llama with experts, trained by NeMo. See `UpcycledLlamaConfig`."""


def architecture_fields(arch: Architecture) -> dict[str, Any]:
    """Return the fields of NeMo's Llama configs that a dense model decides.

    Args:
        arch: Its numbers.

    Returns:
        Keyword arguments for `UpcycledLlamaConfig`, or for NeMo's LlamaConfig (Llama31Config
        where there is RoPE scaling).
    """
    fields: dict[str, Any] = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.kv_channels,
        "vocab_size": arch.vocab_size,
        "layernorm_epsilon": arch.layernorm_epsilon,
        "rotary_base": arch.rotary_base,
        "share_embeddings_and_output_weights": arch.share_embeddings_and_output_weights,
        "init_method_std": arch.init_method_std,
    }
    if arch.rope_scaling is not None:
        fields |= {
            "scale_factor": arch.rope_scaling["factor"],
            "low_freq_factor": arch.rope_scaling["low_freq_factor"],
            "high_freq_factor": arch.rope_scaling["high_freq_factor"],
            "old_context_len": arch.rope_scaling["original_max_position_embeddings"],
        }
    return fields


def moe_fields(arch: Architecture, upcycling: UpcyclingConfig) -> dict[str, Any]:
    """Return the fields of `UpcycledLlamaConfig` that the upcycling decides."""
    if upcycling.num_moe_experts is None:
        return {"num_moe_experts": None}
    return {
        "num_moe_experts": upcycling.num_moe_experts,
        "moe_ffn_hidden_size": arch.ffn_hidden_size,
        "moe_router_topk": upcycling.moe_router_topk,
        "moe_router_pre_softmax": upcycling.moe_router_pre_softmax,
        "moe_expert_capacity_factor": upcycling.moe_expert_capacity_factor,
    }

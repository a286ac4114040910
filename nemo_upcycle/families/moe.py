"""Architectures of transformers that compute an upcycled model, and how to choose one."""

from dataclasses import replace
from typing import Any

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.family import OF_GRANITE, DownMLP, GatedMLP, Operation, Rename
from nemo_upcycle.families.granite import GRANITE
from nemo_upcycle.families.llama import LAYER, LLAMA, MLP
from nemo_upcycle.families.model import MoEModel
from nemo_upcycle.families.moe_family import (
    EXPERT,
    EXPERT_BIAS,
    ROUTER,
    SHARED,
    MoEFamily,
    StackedFC1,
    StackedFC2,
)
from nemo_upcycle.families.qwen2 import QWEN2
from nemo_upcycle.families.qwen3 import QWEN3


def _experts(prefix: str, router: str, gate: str, up: str, down: str) -> dict[str, Operation]:
    expert = prefix + "experts.{expert}."
    return {
        ROUTER: Rename(prefix + router + ".weight"),
        EXPERT + "linear_fc1.weight": GatedMLP(f"{expert}{gate}.weight", f"{expert}{up}.weight"),
        EXPERT + "linear_fc2.weight": DownMLP(f"{expert}{down}.weight"),
    }


def _qwen_config(model: MoEModel) -> dict[str, Any]:
    return {
        "intermediate_size": model.arch.ffn_hidden_size,
        "moe_intermediate_size": model.expert_width,
        "num_experts": model.num_experts,
        "num_experts_per_tok": model.topk,
        "norm_topk_prob": not model.pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, moe in enumerate(model.is_moe) if not moe],
        "use_sliding_window": False,
        "output_router_logits": False,
    }


_QWEN_EXPERTS = _experts(MLP, "gate", "gate_proj", "up_proj", "down_proj")

MIXTRAL = MoEFamily(
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    dense=LLAMA,
    parameters={
        **LLAMA.parameters,
        **_experts(LAYER + "block_sparse_moe.", "gate", "w1", "w3", "w2"),
    },
    config=lambda model: {
        "intermediate_size": model.expert_width,
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.topk,
        "head_dim": model.arch.kv_channels,
        "sliding_window": model.arch.sliding_window,
        "output_router_logits": False,
    },
)

QWEN3_MOE = MoEFamily(
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    dense=QWEN3,
    parameters={**QWEN3.parameters, **_QWEN_EXPERTS},
    config=lambda model: {
        **_qwen_config(model),
        "head_dim": model.arch.kv_channels,
        "attention_bias": False,
    },
)


def _shared_expert(prefix: str) -> dict[str, Operation]:
    return {
        SHARED + "linear_fc1.weight": GatedMLP(
            prefix + "gate_proj.weight", prefix + "up_proj.weight"
        ),
        SHARED + "linear_fc2.weight": Rename(prefix + "down_proj.weight"),
    }


def _empty(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    """Return a shared expert's tensors in a model that has no shared expert."""
    return {
        prefix + "gate_proj.weight": (width, hidden),
        prefix + "up_proj.weight": (width, hidden),
        prefix + "down_proj.weight": (hidden, width),
    }


def _inert(model: MoEModel) -> dict[str, tuple[int, ...]]:
    """Return tensors that make the shared expert's gate neutral.

    A gate of 0 lets half of the output through. A model without a shared expert gets a shared
    expert of one neuron with weights of 0, which adds nothing.
    """
    hidden = model.arch.hidden_size
    zeros: dict[str, tuple[int, ...]] = {MLP + "shared_expert_gate.weight": (1, hidden)}
    if not model.has_shared_expert:
        zeros |= _empty(MLP + "shared_expert.", hidden, 1)
    return zeros


QWEN2_MOE = MoEFamily(
    model_type="qwen2_moe",
    class_name="Qwen2MoeForCausalLM",
    dense=QWEN2,
    parameters={
        **QWEN2.parameters,
        **_QWEN_EXPERTS,
        **_shared_expert(MLP + "shared_expert."),
    },
    config=lambda model: {
        **_qwen_config(model),
        "qkv_bias": model.arch.add_qkv_bias,
        "shared_expert_intermediate_size": model.shared_width or 1,
    },
    layer_zeros=_inert,
    doubled="shared_expert.down_proj.weight",
)


def _without(model: MoEModel) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a GLM-4-MoE that the model does not have; a shared expert is empty."""
    zeros: dict[str, tuple[int, ...]] = {}
    if not model.has_expert_bias:
        zeros[MLP + "gate.e_score_correction_bias"] = (model.num_experts,)
    if not model.has_shared_expert:
        zeros |= _empty(MLP + "shared_experts.", model.arch.hidden_size, 0)
    return zeros


# Attention with biases, with norms of queries and keys, with both or neither.
_GLM4 = replace(
    QWEN2,
    parameters={**QWEN2.parameters, **QWEN3.parameters},
    tensors={**QWEN2.tensors, **QWEN3.tensors},
)

GLM4_MOE = MoEFamily(
    model_type="glm4_moe",
    class_name="Glm4MoeForCausalLM",
    dense=_GLM4,
    parameters={
        **_GLM4.parameters,
        **_QWEN_EXPERTS,
        EXPERT_BIAS: Rename(MLP + "gate.e_score_correction_bias"),
        **_shared_expert(MLP + "shared_experts."),
    },
    config=lambda model: {
        "intermediate_size": model.arch.ffn_hidden_size,
        "moe_intermediate_size": model.expert_width,
        "n_routed_experts": model.num_experts,
        "n_shared_experts": model.shared_width // model.expert_width,
        "num_experts_per_tok": model.topk,
        # As in Megatron-Core, the score of a single expert is not divided by itself.
        "norm_topk_prob": model.topk > 1,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": model.is_moe.index(True),
        "head_dim": model.arch.kv_channels,
        "partial_rotary_factor": model.arch.rotary_percent,
        "attention_bias": model.arch.add_qkv_bias,
        "use_qk_norm": model.arch.qk_layernorm,
    },
    layer_zeros=_without,
)


_SPARSE, _SHARED_MLP = LAYER + "block_sparse_moe.", LAYER + "shared_mlp."


def _granite_config(model: MoEModel) -> dict[str, Any]:
    arch = model.arch
    shared = {"shared_intermediate_size": arch.ffn_hidden_size} if model.has_shared_expert else {}
    return {
        "intermediate_size": model.expert_width,
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.topk,
        **{name: arch.multipliers[name] for name in OF_GRANITE},
        "attention_multiplier": arch.attention_multiplier or arch.kv_channels**-0.5,
        "output_router_logits": False,
        **shared,
    }


GRANITE_MOE = MoEFamily(
    model_type="granitemoe",
    class_name="GraniteMoeForCausalLM",
    dense=GRANITE,
    parameters={
        **GRANITE.parameters,
        ROUTER: Rename(_SPARSE + "router.layer.weight"),
        EXPERT + "linear_fc1.weight": StackedFC1(_SPARSE + "input_linear.weight"),
        EXPERT + "linear_fc2.weight": StackedFC2(_SPARSE + "output_linear.weight"),
    },
    config=_granite_config,
)

GRANITE_MOE_SHARED = replace(
    GRANITE_MOE,
    model_type="granitemoeshared",
    class_name="GraniteMoeSharedForCausalLM",
    parameters={
        **GRANITE_MOE.parameters,
        SHARED + "linear_fc1.weight": GatedMLP(
            _SHARED_MLP + "input_linear.weight", _SHARED_MLP + "input_linear.weight"
        ),
        SHARED + "linear_fc2.weight": Rename(_SHARED_MLP + "output_linear.weight"),
    },
)


def moe_family_of(model: MoEModel) -> MoEFamily:
    """Return the architecture of transformers that computes an upcycled model.

    Raises:
        UpcyclingError: No architecture does; the message says what does not fit.
    """
    arch = model.arch
    _refuse(not arch.gated_linear_unit, "experts with squared ReLU and no gate")
    _refuse(arch.norm_has_bias, "LayerNorm with biases")
    _refuse(arch.normalization == "RMSNorm1p", "norms that add 1 to their weight")
    _refuse(bool(arch.nope_layers), f"layers without RoPE ({list(arch.nope_layers)})")
    _refuse(model.logit_normalization is not None, "normalized router logits")
    if model.score_function == "sigmoid":
        return _with_sigmoid(model)
    _refuse(arch.rotary_percent != 1, f"rotary_percent={arch.rotary_percent}")
    if arch.qk_layernorm:
        _refuse(arch.add_qkv_bias, "norms of queries and keys together with their biases")
        _refuse(model.has_shared_expert, "norms of queries and keys with a shared expert")
        _refuse(arch.sliding_window is not None, "norms of queries and keys with a window")
        _refuse(arch.is_multiplied, "norms of queries and keys with multipliers")
        return QWEN3_MOE
    heads = arch.num_attention_heads * arch.kv_channels
    if arch.is_multiplied:
        for what, applies in {
            "biases": arch.add_qkv_bias,
            "a sliding window": arch.sliding_window is not None,
            "softmax before top-k": model.pre_softmax,
            "dense layers": not all(model.is_moe),
            "a shared part of the layer": model.shared_width not in (0, arch.ffn_hidden_size),
            f"heads of size {arch.kv_channels}": heads != arch.hidden_size,
        }.items():
            _refuse(applies, f"multipliers together with {what}")
        return GRANITE_MOE_SHARED if model.has_shared_expert else GRANITE_MOE
    _refuse(model.shared_width == 1, "a shared expert of one neuron")
    plain = all(model.is_moe) and not (
        model.pre_softmax or arch.add_qkv_bias or model.has_shared_expert
    )
    if plain:
        return MIXTRAL
    why = "softmax before top-k, biases, dense layers or a shared expert"
    _refuse(arch.sliding_window is not None, f"{why}, together with a sliding window")
    _refuse(heads != arch.hidden_size, f"{why}, together with heads of size {arch.kv_channels}")
    return QWEN2_MOE


def _with_sigmoid(model: MoEModel) -> MoEFamily:
    arch, first = model.arch, model.is_moe.index(True)
    for what, applies in {
        "a sliding window": arch.sliding_window is not None,
        "multipliers": arch.is_multiplied,
        "dense layers after MoE layers": not all(model.is_moe[first:]),
        f"a shared expert of {model.shared_width} neurons, no multiple of the "
        f"{model.expert_width} of an expert": model.shared_width % model.expert_width > 0,
    }.items():
        _refuse(applies, f"sigmoid scores together with {what}")
    return GLM4_MOE


def _refuse(applies: bool, what: str) -> None:
    if applies:
        raise UpcyclingError(
            f"The model has {what}, which no Mixture-of-Experts architecture of transformers "
            "computes; expected what Mixtral, Qwen2-MoE, Qwen3-MoE, GLM-4-MoE or Granite-MoE "
            "compute. It can be evaluated and trained in NeMo."
        )

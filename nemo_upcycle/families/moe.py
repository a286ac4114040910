"""Architectures of transformers that compute an upcycled model, and how to choose one.

The names of expert tensors here are those in files of both transformers 4 and 5.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.family import (
    DownMLP,
    Family,
    GatedMLP,
    Operation,
    Rename,
)
from nemo_upcycle.families.llama import LAYER, LLAMA, MEGATRON_LAYER, MLP
from nemo_upcycle.families.model import MoEModel
from nemo_upcycle.families.names import EXPERT_BIAS
from nemo_upcycle.families.qwen2 import QWEN2
from nemo_upcycle.families.qwen3 import QWEN3

_EXPERT = MEGATRON_LAYER + "mlp.experts.{expert}."
_SHARED = MEGATRON_LAYER + "mlp.shared_experts."
_ROUTER = MEGATRON_LAYER + "mlp.router.weight"
_EXPERT_BIAS = MEGATRON_LAYER + EXPERT_BIAS


@dataclass(frozen=True)
class MoEFamily:
    """An architecture of transformers.

    Attributes:
        model_type: The name in `config.json`.
        class_name: The model's class.
        dense: The dense family that is the same except for the experts.
        parameters: Operations by Megatron parameter, with `{layer}` and `{expert}` for repeated
            ones.
        config: Keys of `config.json` that are specific to this architecture.
        layer_zeros: Tensors of an MoE layer without a counterpart in Megatron; must be 0.
        doubled: Suffix of tensors that are twice Megatron's.
    """

    model_type: str
    class_name: str
    dense: Family
    parameters: Mapping[str, Operation]
    config: Callable[[MoEModel], dict[str, Any]]
    layer_zeros: Callable[[MoEModel], Mapping[str, tuple[int, ...]]] = field(
        default=lambda model: {}
    )
    doubled: str | None = None

    def shapes(self, model: MoEModel) -> dict[str, tuple[int, ...]]:
        """Return the expected shape of every tensor, layers and experts filled in."""
        moe = [layer for layer, is_moe in enumerate(model.is_moe) if is_moe]
        replaced = tuple(MLP.format(layer=layer) for layer in moe)
        shapes = {
            name: shape
            for name, shape in self.dense.shapes(model.arch).items()
            if not name.startswith(replaced)
            and (model.arch.add_qkv_bias or not name.endswith("_proj.bias"))
            and (model.arch.qk_layernorm or not name.endswith(("q_norm.weight", "k_norm.weight")))
        }
        for layer in moe:
            shapes |= self._moe_layer(model, layer)
        return shapes | self.zeros(model)

    def _moe_layer(self, model: MoEModel, layer: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name in self.parameters.keys() - self.dense.parameters.keys():
            if name.startswith(_SHARED) and not model.has_shared_expert:
                continue
            if name == _EXPERT_BIAS and not model.has_expert_bias:
                continue
            shape = _shape(name, model)
            tensors = [rows.tensor for rows in self.parameters[name].rows(model.arch)]
            for expert in range(model.num_experts if name.startswith(_EXPERT) else 1):
                shapes |= {t.format(layer=layer, expert=expert): shape for t in tensors}
        return shapes

    def zeros(self, model: MoEModel) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of tensors without a counterpart in Megatron, which must be 0."""
        layers = [layer for layer, moe in enumerate(model.is_moe) if moe]
        shapes = self.layer_zeros(model)
        return {name.format(layer=n): shape for name, shape in shapes.items() for n in layers}


def _shape(name: str, model: MoEModel) -> tuple[int, ...]:
    """Return the shape of a tensor of an MoE layer's router, experts or shared expert."""
    hidden = model.arch.hidden_size
    if name == _EXPERT_BIAS:
        return (model.num_experts,)
    if name == _ROUTER:
        return (model.num_experts, hidden)
    width = model.expert_width if name.startswith(_EXPERT) else model.shared_width
    return (hidden, width) if name.endswith("linear_fc2.weight") else (width, hidden)


def _experts(prefix: str, router: str, gate: str, up: str, down: str) -> dict[str, Operation]:
    expert = prefix + "experts.{expert}."
    return {
        _ROUTER: Rename(prefix + router + ".weight"),
        _EXPERT + "linear_fc1.weight": GatedMLP(f"{expert}{gate}.weight", f"{expert}{up}.weight"),
        _EXPERT + "linear_fc2.weight": DownMLP(f"{expert}{down}.weight"),
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
        _SHARED + "linear_fc1.weight": GatedMLP(
            prefix + "gate_proj.weight", prefix + "up_proj.weight"
        ),
        _SHARED + "linear_fc2.weight": Rename(prefix + "down_proj.weight"),
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
        _EXPERT_BIAS: Rename(MLP + "gate.e_score_correction_bias"),
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


def moe_family_of(model: MoEModel) -> MoEFamily:
    """Return the architecture of transformers that computes an upcycled model.

    Raises:
        UpcyclingError: No architecture does; the message says what does not fit.
    """
    arch = model.arch
    _refuse(not arch.gated_linear_unit, "experts with squared ReLU and no gate")
    _refuse(arch.norm_has_bias, "LayerNorm with biases")
    _refuse(model.logit_normalization is not None, "normalised router logits")
    if model.score_function == "sigmoid":
        return _with_sigmoid(model)
    _refuse(arch.rotary_percent != 1, f"rotary_percent={arch.rotary_percent}")
    if arch.qk_layernorm:
        _refuse(arch.add_qkv_bias, "norms of queries and keys together with their biases")
        _refuse(model.has_shared_expert, "norms of queries and keys with a shared expert")
        _refuse(arch.sliding_window is not None, "norms of queries and keys with a window")
        return QWEN3_MOE
    _refuse(model.shared_width == 1, "a shared expert of one neuron")
    plain = all(model.is_moe) and not (
        model.pre_softmax or arch.add_qkv_bias or model.has_shared_expert
    )
    if plain:
        return MIXTRAL
    why = "softmax before top-k, biases, dense layers or a shared expert"
    _refuse(arch.sliding_window is not None, f"{why}, together with a sliding window")
    heads = arch.num_attention_heads * arch.kv_channels
    _refuse(heads != arch.hidden_size, f"{why}, together with heads of size {arch.kv_channels}")
    return QWEN2_MOE


def _with_sigmoid(model: MoEModel) -> MoEFamily:
    _refuse(model.arch.sliding_window is not None, "sigmoid scores with a sliding window")
    first = model.is_moe.index(True)
    _refuse(not all(model.is_moe[first:]), "sigmoid scores with dense layers after MoE layers")
    _refuse(
        model.shared_width % model.expert_width > 0,
        f"sigmoid scores and a shared expert of {model.shared_width} neurons, no multiple of the "
        f"{model.expert_width} of an expert,",
    )
    return GLM4_MOE


def _refuse(applies: bool, what: str) -> None:
    if applies:
        raise UpcyclingError(
            f"The model has {what}, which no Mixture-of-Experts architecture of transformers "
            "computes; expected what Mixtral, Qwen2-MoE, Qwen3-MoE or GLM-4-MoE compute. It can be "
            "evaluated and trained in NeMo."
        )

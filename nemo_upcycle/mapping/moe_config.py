"""Read what an MoE is out of a Hugging Face `config.json`: the inverse of `MoEFamily.config`."""

from collections.abc import Mapping
from typing import Any

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.mapping.huggingface import read_architecture
from nemo_upcycle.mapping.moe import MIXTRAL, QWEN2_MOE, QWEN3_MOE, MoEFamily, MoEModel

MOE_FAMILIES: dict[str, MoEFamily] = {
    family.model_type: family for family in (MIXTRAL, QWEN2_MOE, QWEN3_MOE)
}

# What transformers takes where config.json is silent, as far as it is not what all families take.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {"rope_theta": 1e6, "rms_norm_eps": 1e-5},
    "qwen2_moe": {"qkv_bias": True},
    "qwen3_moe": {},
}
_EXPECTED = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}


def moe_model(config: Mapping[str, Any]) -> MoEModel:
    """Read an MoE's numbers.

    Args:
        config: The parsed `config.json`.

    Raises:
        UpcyclingError: It is of another family, a number is missing, or Megatron's model does not
            compute what it asks for.
    """
    kind = str(config.get("model_type"))
    if kind not in MOE_FAMILIES:
        raise UpcyclingError(
            f"config.json says model_type={kind!r}; MoE families that can be read: "
            f"{', '.join(MOE_FAMILIES)}."
        )
    config = {**_DEFAULTS[kind], **config}
    try:
        return _mixtral(config) if kind == "mixtral" else _qwen(config, kind)
    except KeyError as error:
        raise UpcyclingError(
            f"config.json lacks {error}; expected the config of a {kind} model."
        ) from None


def _mixtral(config: Mapping[str, Any]) -> MoEModel:
    arch = read_architecture(config, _EXPECTED, sliding_window=config.get("sliding_window"))
    return MoEModel(
        arch=arch,
        num_experts=config["num_local_experts"],
        topk=config["num_experts_per_tok"],
        pre_softmax=False,
        # A granular model's dense width is not said; no layer is that wide.
        expert_width=arch.ffn_hidden_size,
        is_moe=(True,) * arch.num_layers,
        has_shared_expert=False,
    )


def _qwen(config: Mapping[str, Any], kind: str) -> MoEModel:
    own = {"qk_layernorm": True} if kind == "qwen3_moe" else {"add_qkv_bias": config["qkv_bias"]}
    arch = read_architecture(config, _EXPECTED, **own)
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    shared = config.get("shared_expert_intermediate_size", 1)
    if shared not in (1, arch.ffn_hidden_size):
        raise UpcyclingError(
            f"config.json says shared_expert_intermediate_size={shared}; expected the dense "
            f"layer's width, {arch.ffn_hidden_size}, or 1, which is none."
        )
    return MoEModel(
        arch=arch,
        # transformers 5 writes the second for Qwen3-MoE.
        num_experts=config.get("num_experts") or config["num_local_experts"],
        topk=config["num_experts_per_tok"],
        pre_softmax=not config.get("norm_topk_prob", False),
        expert_width=config["moe_intermediate_size"],
        is_moe=tuple(
            layer not in dense and (layer + 1) % step == 0 for layer in range(arch.num_layers)
        ),
        has_shared_expert=shared != 1,
    )

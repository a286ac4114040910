"""The model config of a Megatron checkpoint: NeMo 2's `model.yaml`, Megatron-LM's `args`, or
Megatron-Bridge's `run_config.yaml`.

All become a dict with Megatron's field names. Nothing named in a file is imported.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nemo_upcycle.checkpoint.beside import unsaid_fields
from nemo_upcycle.checkpoint.common_state import read_common_state
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.megatron import MEGATRON_ROPE_SCALING, MODEL_TYPE

# Megatron-LM's names that differ from Megatron-Core's configs.
_ARGS = {
    "norm_epsilon": "layernorm_epsilon",
    "num_experts": "num_moe_experts",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
    "swiglu": "gated_linear_unit",
}

_ALIASES = {"relu2": "squared_relu"}
"""Other names of activation functions in Megatron-Bridge."""

_PLAIN_MODELS = re.compile(
    r"(Bridge)?GPTModelConfig|GPTModelProvider|"
    r"(CodeLlama|Llama|Mistral|Qwen|Nemotron|Minitron)[0-9]*ModelProvider\w*"
)
"""Megatron's and Megatron-Bridge's classes of dense models that compute what their fields say.

Others, such as Gemma's, compute more: no field says so.
"""


class _Loader(yaml.SafeLoader):
    """Plain YAML; tagged values become None."""


_Loader.add_constructor(None, lambda loader, node: None)


def read_model_yaml(path: Path) -> dict[str, Any]:
    """Read the model's config from NeMo 2's `context/model.yaml`.

    Raises:
        UpcyclingError: The file is missing or not a model config.
    """
    try:
        model = yaml.load(path.read_text(), _Loader)
        fields = {name: _plain(value) for name, value in model["config"].items()}
    except FileNotFoundError:
        raise UpcyclingError(
            f"{path} is missing, which describes the model; expected a complete NeMo 2 "
            "checkpoint, with weights/ and context/. Copy the checkpoint again."
        ) from None
    except Exception as error:  # invalid YAML can raise anything
        said = " ".join(str(error).split())  # YAML's errors have several lines
        raise UpcyclingError(
            f"{path} cannot be read as NeMo 2's model.yaml ({type(error).__name__}: {said}). "
            "The file is damaged; copy the checkpoint again."
        ) from error
    return {"model_type": MODEL_TYPE} | fields


def _plain(value: Any) -> Any:
    """Return the name of a function or a dtype instead of the recorded reference."""
    if isinstance(value, dict) and value.keys() <= {"_target_", "_call_"}:
        return value.get("_target_")
    return value


def read_args(weights: Path) -> dict[str, Any]:
    """Read the model's config from the `args` that Megatron-LM saves.

    Args:
        weights: Directory of `.metadata`.

    Raises:
        UpcyclingError: The checkpoint is damaged or holds no args.
    """
    args = (read_common_state(weights) or {}).get("args")
    args = getattr(args, "state", args)
    if not isinstance(args, Mapping) or "num_layers" not in args:
        raise UpcyclingError(
            f"{weights} does not describe the model: there is no NeMo 2 context/model.yaml beside "
            "it, no Megatron-Bridge run_config.yaml in it, and no args in common.pt or the "
            "checkpoint's common state. Give a complete checkpoint."
        )
    fields = {_ARGS.get(str(name), str(name)): value for name, value in args.items()}
    # The user's value, before padding and often before special tokens.
    fields.pop("vocab_size", None)
    if not fields.get("group_query_attention"):
        fields["num_query_groups"] = fields.get("num_attention_heads")
    if "untie_embeddings_and_output_weights" in fields:
        untied = fields["untie_embeddings_and_output_weights"]
        fields["share_embeddings_and_output_weights"] = not untied
    if fields.get("use_rope_scaling"):
        fields |= _rope_scaling(fields)
    fields["activation_func"] = _activation(fields)
    return fields | {"model_type": MODEL_TYPE}


def _rope_scaling(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return Megatron-Core's own RoPE scaling, of which a config records the factor alone."""
    return {"scale_factor": fields.get("rope_scaling_factor", 8.0)} | MEGATRON_ROPE_SCALING


def _activation(args: Mapping[str, Any]) -> str:
    if args.get("gated_linear_unit"):
        return "silu"
    if args.get("quick_geglu"):
        return "quick_gelu"
    return "squared_relu" if args.get("squared_relu") else "gelu"


def read_run_config(path: Path) -> dict[str, Any]:
    """Read the model's config from Megatron-Bridge's `run_config.yaml`.

    Raises:
        UpcyclingError: The file is damaged, or describes a model of another class.
    """
    try:
        model = yaml.load(path.read_text(), _Loader)["model"]
        # A GPTModelConfig contains a TransformerConfig; Bridge's older providers are one.
        found = {**(model.get("transformer") or {}), **model}
        fields = {str(name): _plain(value) for name, value in found.items()}
        kind = str(model.get("_target_")).rpartition(".")[2]
        unsaid = unsaid_fields(model.get("extra_checkpoint_metadata"))
    except Exception as error:  # invalid YAML can raise anything
        said = " ".join(str(error).split())
        raise UpcyclingError(
            f"{path} cannot be read as Megatron-Bridge's run_config.yaml "
            f"({type(error).__name__}: {said}). The file is damaged; copy the checkpoint again."
        ) from error
    fields.pop("transformer", None)
    if not fields.get("num_moe_experts") and not _PLAIN_MODELS.fullmatch(kind):
        raise UpcyclingError(
            f"{path} says that the model is a {kind}, which may compute more than its fields say; "
            "expected a GPTModelConfig or a provider of Llama, Mistral, Qwen or Nemotron. Export "
            "the model to Hugging Face with Megatron-Bridge, and give that directory."
        )
    if fields.get("rope_scaling"):
        fields |= _rope_scaling(fields)
    function = fields.get("activation_func")  # None if a GPTModelConfig of Megatron's was saved
    fields["activation_func"] = _ALIASES.get(str(function), function)
    return {**fields, **unsaid, "model_type": MODEL_TYPE}

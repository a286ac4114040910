"""The model of a dense checkpoint in the configs of Megatron's own training loop, and back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import fields as fields_of
from types import SimpleNamespace
from typing import Any

import torch

from nemo_upcycle.checkpoint.beside import MODEL_FIELDS
from nemo_upcycle.checkpoint.branches import open_branches
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.engine.activations import gelu_tanh
from nemo_upcycle.engine.cpu import MODEL_OVERRIDES, cpu_layer_spec
from nemo_upcycle.engine.model import (
    leave_padding_out,
    mark_experts,
    multiply,
    rope_frequencies,
    two_stages_fields,
)
from nemo_upcycle.engine.routers import set_up_routers
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture
from nemo_upcycle.families.family import MULTIPLIERS
from nemo_upcycle.families.fields import (
    DENSE_GRADIENT,
    LOGIT_NORMALIZATION,
    architecture_fields,
    moe_fields,
    window_fields,
)
from nemo_upcycle.families.megatron import LLAMA_FIELDS, MEGATRON_ROPE_SCALING
from nemo_upcycle.families.rope import ROPE_SCALING_FIELDS, scaling_fields
from nemo_upcycle.plans.layout import padded_vocabulary

Chunks = list[torch.nn.Module]
"""A rank's model, one module per virtual pipeline stage."""


def gpt_model_config(
    dense_checkpoint: str,
    upcycling: UpcyclingConfig | None = None,
    folding: ParallelFolding | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seq_length: int | None = None,
    config_class: type | None = None,
    **others: Any,
) -> Any:
    """Return the config of the model that a dense checkpoint becomes, for `GPTModelBuilder`.

    All numbers come from the checkpoint: attention, RoPE and RoPE scaling, window, norms, biases,
    tied embeddings, vocabulary. The layers are Megatron's own, with Transformer Engine. Without a
    GPU the layers are built from modules that run on CPU.

    Args:
        dense_checkpoint: Directory in the format of Hugging Face, NeMo 2, Megatron-LM or
            Megatron-Bridge, or the name of a model in the local Hugging Face cache; several,
            separated by semicolons.
        upcycling: What the feed-forward layers become; None takes `UpcyclingConfig()`.
        folding: The parallel mapping; None takes one rank.
        dtype: The parameters' dtype.
        seq_length: Tokens per sequence; None takes the dense model's context length.
        config_class: Bridge's `BridgeGPTModelConfig`; None takes Megatron's `GPTModelConfig`.
        others: Further fields of `GPTModelConfig` or of the `TransformerConfig` inside, such as
            `recompute_granularity`. These values replace those that the checkpoint gives.

    Returns:
        A `megatron.training.models.gpt.GPTModelConfig`, or a `config_class`. The hooks in
        `pre_wrap_hooks` do what no field can express: append to the list, do not replace the list.

    Raises:
        UpcyclingError: The checkpoint cannot be read, a field is unknown, or Megatron-Core is
            older than 0.18.
    """
    gpt, transformer = _config_classes()
    arch = open_branches(dense_checkpoint).architecture
    folding, upcycling = folding or ParallelFolding(), upcycling or UpcyclingConfig()
    normalization = upcycling.router_logit_normalization
    finish = FinishModel(arch, normalization, upcycling.router_dense_gradient)
    values = {
        **model_fields(arch, upcycling, folding, dtype, seq_length),
        "autocast_dtype": dtype,
        "pre_wrap_hooks": [finish],
        "extra_checkpoint_metadata": {MODEL_FIELDS: fields_beside_config(arch, normalization)},
        **_of_machine(),
        **others,
    }
    for name in (LOGIT_NORMALIZATION, DENSE_GRADIENT):
        values.pop(name, None)  # no field of Megatron's: a hook sets it
    of_gpt = {field.name for field in fields_of(gpt)}
    of_transformer = {field.name for field in fields_of(transformer)}
    if unknown := sorted(values.keys() - of_gpt - of_transformer):
        raise UpcyclingError(
            f"Neither GPTModelConfig nor TransformerConfig has {', '.join(unknown)}. "
            "Give fields of theirs."
        )
    inner = transformer(**{name: values[name] for name in values.keys() & of_transformer})
    outer = {name: values[name] for name in values.keys() & of_gpt}
    return (config_class or gpt)(transformer=inner, **outer)


def _config_classes() -> tuple[type, type]:
    try:
        from megatron.training.models.gpt import GPTModelConfig, TransformerConfig
    except ImportError as error:
        raise UpcyclingError(
            f"megatron.training cannot be imported ({error}); expected Megatron-Core 0.18 or "
            "newer: pip install 'nemo-upcycle[megatron]', on Python 3.12 or newer."
        ) from error
    return GPTModelConfig, TransformerConfig


def model_fields(
    arch: Architecture,
    upcycling: UpcyclingConfig,
    folding: ParallelFolding,
    dtype: torch.dtype,
    seq_length: int | None = None,
) -> dict[str, Any]:
    """Return all that an upcycled model is, in the fields of Megatron's configs and models.

    Args:
        arch: The dense model's numbers.
        upcycling: What its feed-forward layers become.
        folding: How it is spread.
        dtype: Of the parameters.
        seq_length: Tokens of a sequence; None takes the dense model's context.
    """
    length = seq_length or arch.max_position_embeddings
    return {
        **fields_of_architecture(arch, length),
        **moe_fields(arch, upcycling),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "moe_router_dtype": "fp32",  # routing decides by small differences
        "seq_length": length,
        # Bridge pads no vocabulary that the config has.
        "vocab_size": padded_vocabulary(arch.vocab_size, folding.tensor_model_parallel_size),
        **folding.strategy_arguments,
        **two_stages_fields(
            folding.pipeline_model_parallel_size, folding.virtual_pipeline_model_parallel_size
        ),
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
    }


def fields_of_architecture(arch: Architecture, seq_length: int | None) -> dict[str, Any]:
    """Return the fields of Megatron's configs that a dense model determines.

    Args:
        arch: The dense model's architecture.
        seq_length: Maximum tokens per sequence; None for no limit.
    """
    found = LLAMA_FIELDS | architecture_fields(arch) | window_fields(arch, seq_length)
    found["activation_func"] = _activation(found.get("activation_func", "silu"))
    for name in MULTIPLIERS:
        found.pop(name, None)
    scaling = {name: found.pop(name) for name in ROPE_SCALING_FIELDS if name in found}
    if _is_megatrons(scaling):
        found |= {"rope_scaling": True, "rope_scaling_factor": scaling["scale_factor"]}
    return found


def _activation(name: str) -> Any:
    from megatron.core.activations import squared_relu

    functions = (torch.nn.functional.silu, squared_relu, gelu_tanh)
    return {function.__name__: function for function in functions}[name]


def _is_megatrons(scaling: Mapping[str, float]) -> bool:
    """Return whether Megatron's field for RoPE scaling, which is a factor alone, is sufficient."""
    own = MEGATRON_ROPE_SCALING
    return bool(scaling) and all(scaling.get(name) == value for name, value in own.items())


def _of_machine() -> dict[str, Any]:
    if torch.cuda.is_available():
        return {"moe_grouped_gemm": True, "moe_permute_fusion": True}
    return {
        **MODEL_OVERRIDES,
        "transformer_impl": "local",
        "transformer_layer_spec": _cpu_layers,
    }


def _cpu_layers(config: Any, vp_stage: int | None = None) -> Any:
    return cpu_layer_spec(config.transformer, vp_stage)


@dataclass(frozen=True)
class FinishModel:
    """Sets in a rank's model what no field of the config can express; a hook, run at every start.

    Attributes:
        arch: The dense model's architecture.
        logit_normalization: See `UpcyclingConfig.router_logit_normalization`.
        dense_gradient: See `UpcyclingConfig.router_dense_gradient`.
    """

    arch: Architecture
    logit_normalization: float | None = None
    dense_gradient: bool = False

    def __call__(self, chunks: Chunks) -> Chunks:
        for chunk in chunks:
            mark_experts(chunk)
            multiply(chunk, self.arch.multipliers)
            chunk.rotary_pos_emb.inv_freq = _frequencies(chunk, self.arch)
            set_up_routers(chunk, self.logit_normalization, self.dense_gradient)
            # `described` reads them; Megatron's own configs have no such fields.
            setattr(chunk.config, LOGIT_NORMALIZATION, self.logit_normalization)
            setattr(chunk.config, DENSE_GRADIENT, self.dense_gradient)
            if chunk.post_process:
                leave_padding_out(chunk, self.arch.vocab_size)
        return chunks


def _frequencies(chunk: torch.nn.Module, arch: Architecture) -> torch.Tensor:
    rotated = arch.kv_channels
    if arch.rotary_percent < 1.0:
        rotated = int(rotated * arch.rotary_percent)
    return rope_frequencies(chunk, rotated, arch.rotary_base, arch.rope_scaling)


def described(chunks: Sequence[torch.nn.Module], vocab_size_divisible_by: int) -> SimpleNamespace:
    """Return a rank's model as the fields of Megatron's and NeMo's configs.

    A `TransformerConfig` has neither vocabulary nor positions; the model has both.

    Args:
        chunks: The rank's Megatron-Core GPT models.
        vocab_size_divisible_by: Multiple to which the vocabulary is padded per tensor-parallel
            rank.

    Raises:
        UpcyclingError: The model is a HybridModel.
    """
    model = chunks[0]
    if hasattr(model, "hybrid_layer_pattern"):
        raise UpcyclingError(
            "The model is a HybridModel, whose parameters have other names; expected a GPTModel. "
            "Build the model from a GPTModelConfig."
        )
    found = {
        **vars(model.config),
        "vocab_size": model.vocab_size,
        "seq_length": model.max_sequence_length,
        "make_vocab_size_divisible_by": vocab_size_divisible_by,
        "share_embeddings_and_output_weights": model.share_embeddings_and_output_weights,
        "position_embedding_type": model.position_embedding_type,
        **getattr(model, "multipliers", {}),
    }
    rope = getattr(model, "rotary_pos_emb", None)
    if rope is not None:
        found |= {
            "rotary_percent": model.rotary_percent,
            "rotary_base": model.rotary_base,
            "seq_len_interpolation_factor": rope.seq_len_interpolation_factor,
        }
    return SimpleNamespace(**found)


def with_rope_of(
    config: SimpleNamespace, chunks: Sequence[torch.nn.Module], arch: Architecture
) -> SimpleNamespace:
    """Return a description with the dense model's RoPE scaling, if the model has this scaling.

    Megatron's models do not record their scaling; the frequencies show the scaling.

    Args:
        config: The result of `described`.
        chunks: The rank's models.
        arch: The dense model's architecture.

    Raises:
        UpcyclingError: The model has other frequencies.
    """
    rope = getattr(chunks[0], "rotary_pos_emb", None)
    if rope is None or config.rotary_base != arch.rotary_base:
        return config  # the comparison of fields reports this
    expected = _frequencies(chunks[0], arch)
    if rope.inv_freq.shape == expected.shape and not torch.allclose(
        rope.inv_freq, expected, rtol=1e-5, atol=0.0
    ):
        raise UpcyclingError(
            f"The model's RoPE is scaled otherwise than the dense checkpoint's, which says "
            f"{dict(arch.rope_scaling) if arch.rope_scaling else 'no scaling'}: the weights would "
            "compute something else. Make the config with nemo_upcycle.megatron.gpt_model_config; "
            "Megatron-LM's --use-rope-scaling has only the numbers of Llama 3.1."
        )
    return SimpleNamespace(**{**vars(config), **scaling_fields(arch.rope_scaling)})


def fields_beside_config(
    arch: Architecture, logit_normalization: float | None = None
) -> dict[str, Any]:
    """Return the fields of a model that Megatron-LM's and Bridge's configs do not record.

    Args:
        arch: The dense model's architecture.
        logit_normalization: See `UpcyclingConfig.router_logit_normalization`.
    """
    function = architecture_fields(arch).get("activation_func", "silu")
    found = {
        "vocab_size": arch.vocab_size,
        "activation_func": function,
        "softmax_scale": arch.softmax_scale,
        **arch.multipliers,
        **scaling_fields(arch.rope_scaling),
    }
    if logit_normalization is not None:
        found[LOGIT_NORMALIZATION] = logit_normalization
    return found

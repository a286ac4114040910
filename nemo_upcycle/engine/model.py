"""Changes to Megatron-Core's GPT models that no config field can make."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from nemo_upcycle.families.family import MULTIPLIERS


def mark_experts(model: torch.nn.Module) -> None:
    """Mark all experts' parameters for the expert-data-parallel reduction and the gradient norm.

    Megatron marks experts for the reduction only if EP > 1. With EP 1 and ETP ≠ TP, attention and
    experts still have different data-parallel groups. Unmarked experts would then train on part of
    their gradients (NVIDIA/Megatron-LM#1628).

    Megatron's gradient norm counts a parameter on every tensor-parallel rank if the parameter is
    `tensor_model_parallel`, and on the first rank alone otherwise. Transformer Engine from 2.13 on
    does not mark experts, so the experts of the other ranks would be omitted
    (NVIDIA/Megatron-LM#5916).

    Args:
        model: A Megatron-Core GPT model, not yet wrapped.
    """
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False
            parameter.tensor_model_parallel = True


def leave_padding_out(model: torch.nn.Module, vocab_size: int) -> None:
    """Exclude the rows that pad the vocabulary from the softmax, and so from the loss.

    Megatron counts padding rows as tokens with a logit of 0.

    Args:
        model: A Megatron-Core GPT model with an output layer.
        vocab_size: Rows without padding.
    """
    layer = model.output_layer
    first = layer.tp_group.rank() * layer.output_size_per_partition
    kept = min(max(vocab_size - first, 0), layer.output_size_per_partition)
    if kept == layer.output_size_per_partition:
        return

    def mask(_: torch.nn.Module, __: object, output: tuple[torch.Tensor, object]) -> None:
        logits = output[0]
        logits[..., kept:] = torch.finfo(logits.dtype).min

    layer.register_forward_hook(mask)


def multiply(model: torch.nn.Module, factors: Mapping[str, float]) -> None:
    """Multiply embeddings, what layers add to the residual, and logits, as Granite and Gemma do.

    The residual's factor is applied where attention and feed-forward are added, which all of
    Megatron's schedules and graphs share. Must be called before `leave_padding_out`.

    Args:
        model: A Megatron-Core GPT model.
        factors: `Architecture.multipliers`.
    """
    model.multipliers = dict(factors)
    embeddings, residual, logits, rounded = (factors[name] for name in MULTIPLIERS)
    if embeddings != 1 and model.pre_process:
        model.embedding.register_forward_hook(lambda _, __, output: output * embeddings)
    if rounded != 1 and model.pre_process:
        model.embedding.register_forward_hook(
            lambda _, __, output: output * torch.tensor(rounded, dtype=output.dtype)
        )
    if residual != 1:
        for layer in model.decoder.layers:
            for name in ("self_attn_bda", "mlp_bda"):
                setattr(layer, name, _with_factor(getattr(layer, name), residual))
    if logits != 1 and model.post_process:
        model.output_layer.register_forward_hook(
            lambda _, __, output: (output[0] / logits, *output[1:])
        )


def _with_factor(bias_dropout_add: Callable[..., Any], factor: float) -> Callable[..., Any]:
    """Return Megatron's sum of a layer's output and the residual, with a factor of the output."""

    def choose(*settings: bool) -> Callable[..., torch.Tensor]:
        add = bias_dropout_add(*settings)

        def multiplied(
            output_with_bias: tuple[torch.Tensor, torch.Tensor | None],
            residual: torch.Tensor,
            dropout: float,
        ) -> torch.Tensor:
            output, bias = output_with_bias
            return add(
                (output * factor, None if bias is None else bias * factor), residual, dropout
            )

        return multiplied

    return choose


def rope_frequencies(
    model: torch.nn.Module, head_size: int, base: float, scaling: Mapping[str, Any] | None
) -> torch.Tensor:
    """Return the inverse frequencies of a dense model's RoPE, as Megatron computes them.

    Args:
        model: A Megatron-Core GPT model, which gives the arithmetic and the device.
        head_size: Rotated dimensions per head.
        base: RoPE's base.
        scaling: The scaling, see `Architecture.rope_scaling`; None for no scaling.

    Returns:
        Frequencies [head_size / 2].
    """
    rope = model.rotary_pos_emb
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=rope.inv_freq.device)
    frequencies = 1.0 / (base ** (exponents / head_size))
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "yarn":
        return _yarn(frequencies, base, scaling)
    numbers = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return rope._apply_scaling(frequencies, **{name: scaling[name] for name in numbers})


def _yarn(frequencies: torch.Tensor, base: float, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Scale frequencies by YaRN (arXiv 2309.00071, section 3.2).

    Frequencies that turn often over the original context stay; those that turn rarely are divided
    by the factor; between them both are mixed. Megatron's own embedding for YaRN ignores partial
    rotation, and its attention factor is lost in Transformer Engine's fused kernel.
    """
    size, length = 2 * len(frequencies), scaling["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(scaling["beta_fast"]), dimension(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high += 0.001 if low == high else 0
    positions = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
    scaled = ((positions - low) / (high - low)).clamp(0, 1)
    return frequencies / scaling["factor"] * scaled + frequencies * (1 - scaled)


def two_stages_fields(stages: int, virtual_stages: int | None) -> dict[str, bool]:
    """Return the fields that two pipeline stages with virtual stages need; none for other counts.

    With two stages, the next and the previous stage are the same rank. In one batch of sends
    Megatron would confuse the tensors of both directions, so each is sent separately.

    Args:
        stages: Number of pipeline-parallel ranks.
        virtual_stages: Virtual stages per rank; None without virtual stages.
    """
    if stages != 2 or not virtual_stages:
        return {}
    return {"overlap_p2p_comm": True, "batch_p2p_comm": False}

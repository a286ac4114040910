"""Compare a model's config with a dense checkpoint's, field by field, before loading weights.

Equal shapes are not enough: many models with equal shapes compute different functions.
"""

from collections.abc import Iterator
from typing import Any

from nemo_upcycle.config import Exactness, UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture
from nemo_upcycle.families.family import MULTIPLIERS
from nemo_upcycle.families.fields import ROUTER_FIELDS, architecture_fields, window_fields
from nemo_upcycle.families.megatron import LLAMA_FIELDS, OF_NO_FAMILY
from nemo_upcycle.plans.layout import padded_vocabulary

_USUAL: dict[str, Any] = (
    LLAMA_FIELDS
    | OF_NO_FAMILY
    | {
        "activation_func": "silu",
        "scale_factor": None,
        "yarn_beta_fast": None,
        **dict.fromkeys(MULTIPLIERS, 1.0),
    }
)
"""Fields that determine a dense model's function; the defaults are a Llama's. Dropout, precision
and fusion are settings of the run and not compared."""

_NOT_OF_FUNCTION = ("init_method_std", "bias_activation_fusion", "vocab_size")
"""Fields of the checkpoint that do not matter, or are compared separately."""

_OF_ROUTER = ROUTER_FIELDS | {
    "moe_input_jitter_eps": None,
    "moe_router_force_load_balancing": False,
}


def check_agreement(
    config: Any,
    arch: Architecture,
    tokenizer_size: int | None = None,
    way_out: str = "Set these fields to what is expected.",
) -> None:
    """Check that a model matches a dense checkpoint's config.

    The run may choose experts, sequence lengths (unless a window depends on them), padding of the
    vocabulary, and the initialization of weights.

    Args:
        config: The model's config: any class of NeMo's GPTConfig.
        arch: The dense checkpoint's architecture.
        tokenizer_size: Size of the vocabulary if the config has none.
        way_out: What the user can do about a difference.

    Raises:
        UpcyclingError: The model differs; the message lists all fields that differ.
    """
    differences = [*_differences(config, arch), *_of_vocabulary(config, arch, tokenizer_size)]
    if differences:
        said = "; ".join(
            f"{name} is {model!r}, expected {dense!r}" for name, model, dense in differences
        )
        raise UpcyclingError(
            f"The model is not the dense checkpoint's: {said}. Its weights would compute something "
            f"else. {way_out} If a change is meant, make it in the checkpoint's config first."
        )


def exactness_of(
    config: Any, upcycling: UpcyclingConfig, dense: Architecture, branches: int
) -> Exactness:
    """Return whether a model that agrees with its dense checkpoint computes it at step 0, and why.

    Args:
        config: The model's.
        upcycling: What the dense model's feed-forward layers become.
        dense: The dense checkpoint's architecture.
        branches: Number of dense checkpoints.
    """
    exactness = upcycling.exactness(dense.gated_linear_unit, branches)
    if upcycling.num_moe_experts is None:
        return exactness
    other = [
        f"{name}={getattr(config, name)!r}"
        for name, usual in _OF_ROUTER.items()
        if getattr(config, name, usual) != usual
    ]
    if not other:
        return exactness
    expected = upcycling.moe_router_score_function
    why = f"{', '.join(other)} makes the router differ from {expected} and top-k"
    return Exactness(False, why if exactness.exact else f"{exactness.reason}; {why}")


def _differences(config: Any, arch: Architecture) -> Iterator[tuple[str, Any, Any]]:
    """Yield fields that differ, with the model's value and the dense model's value."""
    length = config.seq_length
    expected = _USUAL | architecture_fields(arch) | window_fields(arch, length)
    for name, dense in expected.items():
        if name in _NOT_OF_FUNCTION:
            continue
        # A class without a field computes the same as with the field's default.
        model = _of_model(config, name, length)
        if _comparable(model) != _comparable(dense):
            yield name, _shown(model), _shown(dense)


def _of_model(config: Any, name: str, length: int) -> Any:
    value = getattr(config, name, _USUAL.get(name))
    if name == "window_size":
        # Megatron counts the tokens before a token; a window over all of them is no window.
        return None if value is None or not 0 <= value[0] < length - 1 else (value[0], 0)
    if value is None and name in ("num_query_groups", "kv_channels"):
        heads = config.num_attention_heads
        return heads if name == "num_query_groups" else config.hidden_size // heads
    return value


def _comparable(value: Any) -> Any:
    return _shown(value) if callable(value) else value


def _shown(value: Any) -> Any:
    return getattr(value, "__name__", type(value).__name__) if callable(value) else value


def _of_vocabulary(
    config: Any, arch: Architecture, tokenizer_size: int | None
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the vocabulary size if it differs from the dense model's, padded for TP."""
    tp = config.tensor_model_parallel_size
    divisors = (1, tp, config.make_vocab_size_divisible_by * tp)
    padded = {padded_vocabulary(arch.vocab_size, divisor) for divisor in divisors}
    size = config.vocab_size
    if size is None:  # NeMo then uses the tokenizer's size, padded
        if tokenizer_size is None:
            return
        size = padded_vocabulary(tokenizer_size, divisors[-1])
    if size not in padded:
        yield "vocab_size", size, arch.vocab_size

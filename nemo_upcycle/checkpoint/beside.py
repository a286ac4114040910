"""What a run of Megatron-LM's or Megatron-Bridge's records beside its checkpoints.

Both programs save a config of their own, which does not record everything about a model.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.family import MULTIPLIERS
from nemo_upcycle.families.rope import ROPE_SCALING_FIELDS

UPCYCLED_FROM = "upcycled_from.json"
"""The file, in the directory of the checkpoints."""

FIELD = "kept"
"""Key of the record of the dense model's configs, here and in the state of NeMo's callback."""

MODEL_FIELDS = "model_fields"
"""Key, in that record, of Megatron's fields that the programs' configs do not record."""

_UNSAID = (
    *("vocab_size", "activation_func", "softmax_scale", "router_logit_normalization"),
    *MULTIPLIERS,
    *ROPE_SCALING_FIELDS,
)
"""These fields: the vocabulary without padding, functions, RoPE scaling other than Megatron's,
multipliers, normalized router logits, and the factor of the scores, for which Megatron-LM has no
argument."""


OWN_FUNCTIONS = ("gelu_tanh",)
"""Activation functions of this package, for which Megatron-LM has no argument."""


def record_beside(weights: Path) -> Any:
    """Return the parsed record beside a checkpoint; None if there is none.

    Args:
        weights: Directory of `.metadata`.

    Raises:
        UpcyclingError: The record is damaged.
    """
    return record_in(weights.resolve().parent)


def record_in(run: Path) -> Any:
    """Return the parsed record in a run's directory; None if there is none.

    Raises:
        UpcyclingError: The record is damaged.
    """
    path = run / UPCYCLED_FROM
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UpcyclingError(
            f"{path} cannot be read as JSON: {error}. Restore the file, or remove the file to go "
            "on without the dense model's tokens."
        ) from error


def unsaid_fields(record: Any) -> dict[str, Any]:
    """Return the fields of the model in a record; none if the record has none.

    Args:
        record: Data from a file of someone else's: anything.
    """
    found = record.get(MODEL_FIELDS) if isinstance(record, Mapping) else None
    if not isinstance(found, Mapping):
        return {}
    return {name: found[name] for name in _UNSAID if name in found}


def with_unsaid(config: Mapping[str, Any], weights: Path) -> dict[str, Any]:
    """Return a model's config with the fields that are recorded beside the checkpoint.

    Args:
        config: Values by Megatron's field names; a function that is there is kept, unless
            the record's is of this package.
        weights: Directory of `.metadata`.
    """
    record = record_beside(weights)
    found = unsaid_fields(record.get(FIELD)) if isinstance(record, Mapping) else {}
    name = "activation_func"
    if config.get(name) is not None and found.get(name) not in OWN_FUNCTIONS:
        found[name] = config[name]
    return {**config, **found}

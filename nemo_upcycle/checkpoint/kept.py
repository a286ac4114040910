"""Settings in a dense model's configs that training keeps and an exported MoE needs.

A run records these settings in its checkpoints as plain data, because the run's own config lacks
them: training sequences may be shorter than the model's context, and Megatron stores no tokens.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_upcycle.checkpoint import (
    DenseCheckpoint,
    GGUFCheckpoint,
    HuggingFaceCheckpoint,
    MegatronCheckpoint,
    gguf_in,
)
from nemo_upcycle.checkpoint.beside import FIELD, record_beside
from nemo_upcycle.checkpoint.common_state import read_common_state
from nemo_upcycle.checkpoint.huggingface import is_huggingface, resolve_directory
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import architecture_of
from nemo_upcycle.families.family import Architecture
from nemo_upcycle.families.megatron import moe_architecture
from nemo_upcycle.families.moe_config import MOE_FAMILIES, moe_model

CHAT_TEMPLATES = "additional_chat_templates"
"""Directory of named chat templates, beside transformers' `chat_template.jinja`."""

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# First, last and padding token; other families have none.
_DEFAULT_TOKENS: dict[str, tuple[int, int, int | None]] = {
    "llama": (1, 2, None),
    "mistral": (1, 2, None),
    "mixtral": (1, 2, None),
    "nemotron": (2, 3, None),
    "smollm3": (128000, 128001, 128004),
    "phi3": (1, 32000, 32000),
    "gemma": (2, 1, 0),
    "stablelm": (0, 0, None),
    "granite": (1, 2, None),
    "granitemoe": (1, 2, None),
    "granitemoeshared": (1, 2, None),
}
_OTHERS = ("unk_token_id", "sep_token_id", "tokenizer_class", "attention_dropout", "use_cache")
CONFIG = _TOKENS + _OTHERS
"""Keys of config.json that an exported MoE keeps."""

# Keys of older config.json files that now are in generation_config.json.
GENERATION = (
    "max_length",
    "min_length",
    "do_sample",
    "early_stopping",
    "num_beams",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "exponential_decay_length_penalty",
)


def kept_of(source: DenseCheckpoint | str | Path) -> dict[str, Any]:
    """Return a checkpoint's settings besides weights and shapes.

    Args:
        source: The checkpoint that is upcycled, imported, or gives a run its config: opened, or
            the directory, of any format, dense or MoE.

    Returns:
        Plain data: `max_position_embeddings` and `sliding_window` (None for no window). From a
        Hugging Face directory or a GGUF file also `model_type`; `config`, the keys of config.json
        that an exported MoE keeps; `generation_config`; `chat_templates`, files beside the
        tokenizer's own template, by name.

    Raises:
        UpcyclingError: A file cannot be read.
    """
    checkpoint = source if isinstance(source, DenseCheckpoint) else _open(resolve_directory(source))
    if not isinstance(checkpoint, HuggingFaceCheckpoint | GGUFCheckpoint):
        return kept_in(checkpoint.directory) or _context(_architecture(checkpoint.config))
    config, kind = checkpoint.config, str(checkpoint.config.get("model_type"))
    templates = sorted(checkpoint.directory.glob(f"{CHAT_TEMPLATES}/*.jinja"))
    return {
        **_context(_architecture(config)),
        "model_type": kind,
        "config": {name: config[name] for name in CONFIG if name in config},
        "generation_config": _generation_config(checkpoint.directory, config),
        "chat_templates": {path.name: path.read_text() for path in templates},
    }


def _open(directory: Path) -> DenseCheckpoint:
    if (file := gguf_in(directory)) is not None:
        return GGUFCheckpoint(file)
    if is_huggingface(directory):
        return HuggingFaceCheckpoint(directory)
    return MegatronCheckpoint(directory, experts=True)


def _architecture(config: dict[str, Any]) -> Architecture:
    if str(config.get("model_type")) in MOE_FAMILIES:
        return moe_model(config).arch
    if config.get("num_moe_experts"):
        return moe_architecture(config)
    return architecture_of(config)


def _context(arch: Architecture) -> dict[str, Any]:
    return {
        "max_position_embeddings": arch.max_position_embeddings,
        "sliding_window": arch.sliding_window,
    }


def default_tokens(model_type: str) -> dict[str, int | None]:
    """Return transformers' default special tokens, for a config.json without them."""
    return dict(zip(_TOKENS, _DEFAULT_TOKENS.get(model_type, (None,) * 3), strict=True))


def _generation_config(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the directory's generation config, or the settings in config.json instead."""
    path = directory / "generation_config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        said = {name: config.get(name) for name in _TOKENS + GENERATION}
        known = {name: value for name, value in said.items() if value is not None}
        return {"_from_model_config": True, **known} if known else None
    except (OSError, ValueError) as error:
        raise UpcyclingError(
            f"{path} cannot be read as JSON: {error}. Fix the file, or remove the file if the "
            "model needs none."
        ) from error
    if not isinstance(content, dict):
        raise UpcyclingError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content


def kept_in(weights: Path) -> dict[str, Any] | None:
    """Return a run's record of the dense model; None if there is no record.

    Only plain data are read, whatever else the checkpoint's callbacks have stored.

    Args:
        weights: The directory of a checkpoint's `common.pt`.

    Raises:
        UpcyclingError: The file is damaged.
    """
    states = (_plain(state.get(FIELD)) for state in _states(weights))
    return next((kept for kept in states if kept is not None), None)


def dense_checkpoints_in(weights: Path) -> str | None:
    """Return the dense checkpoint or checkpoints that a run has recorded; None if none."""
    sources = (state.get("dense_checkpoint") for state in _states(weights) if FIELD in state)
    return next((source for source in sources if isinstance(source, str)), None)


def recorded_in(weights: Path) -> dict[str, Any] | None:
    """Return a run's whole record of its origin (`engine.provenance.Origin`); None if none.

    Args:
        weights: As in `kept_in`.

    Raises:
        UpcyclingError: The file is damaged.
    """
    return next((state for state in _states(weights) if FIELD in state), None)


def _states(weights: Path) -> Iterator[dict[str, Any]]:
    """Yield the plain data that is recorded in a checkpoint or beside it."""
    common = read_common_state(weights)
    if common is None and (weights / ".metadata").is_file():
        raise UpcyclingError(
            f"{weights / 'common.pt'} is missing, which NeMo and Megatron-LM write with every "
            "checkpoint, or a common state in .metadata: the copy is incomplete. Copy the "
            "checkpoint again."
        )
    callbacks = common.get("callbacks") if isinstance(common, dict) else None
    states = list(callbacks.values()) if isinstance(callbacks, dict) else []
    for state in (*states, record_beside(weights)):
        if isinstance(state, dict):
            yield state


def _plain(value: Any) -> dict[str, Any] | None:
    """Return a value if it is a valid record: JSON types, with a context length."""
    try:
        plain = json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return None
    known = isinstance(plain, dict) and type(plain.get("max_position_embeddings")) is int
    return plain if known else None

"""Checks before any model is loaded: tokenizer, context length, vocabulary."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from nemo_upcycle.checkpoint import (
    HuggingFaceCheckpoint,
    gguf_in,
    is_huggingface,
    open_checkpoint,
    read_config,
)
from nemo_upcycle.checkpoint.described import check_whole
from nemo_upcycle.checkpoint.huggingface import find_directory
from nemo_upcycle.checkpoint.run_directory import resolve_trained
from nemo_upcycle.checkpoint.tokenizer_directory import named_tokenizer, tokenizer_directory
from nemo_upcycle.checkpoint.tokenizer_files import NEEDED, load_tokenizer
from nemo_upcycle.data.encoder import other_tokenizer
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import FAMILIES, Architecture
from nemo_upcycle.families.moe_config import MOE_FAMILIES, moe_model
from nemo_upcycle.trained.opened import open_trained

DTYPES = ("float32", "bfloat16", "float16")
"""Names of the supported inference dtypes."""


@dataclass(frozen=True)
class Described:
    """A checkpoint as described by its config alone.

    Attributes:
        source: The checkpoint as named by the user.
        vocab_size: Vocabulary size in tokens; None if the config has none.
        context_length: Maximum number of tokens per row; None if the config has none.
        arch: Architecture, for families that Megatron computes; else None.
    """

    source: str
    vocab_size: int | None
    context_length: int | None
    arch: Architecture | None = None


def describe(source: str | Path) -> Described:
    """Read vocabulary size and context length from a config; check dense checkpoints' headers.

    Args:
        source: A checkpoint in NeMo 2's, Megatron-LM's or Hugging Face's format, or a run's
            directory.

    Raises:
        UpcyclingError: The checkpoint cannot be read.
    """
    directory = resolve_trained(source)
    arch = _architecture(directory)
    if arch is not None:
        return Described(str(source), arch.vocab_size, arch.max_position_embeddings, arch)
    # Keys of other families; composite models nest the text model's config.
    config = read_config(directory)
    config = config.get("text_config") or config
    lengths = (config.get(n) for n in ("n_positions", "max_position_embeddings", "n_ctx"))
    length = next((value for value in lengths if value is not None), None)
    return Described(str(source), config.get("vocab_size"), length)


def _architecture(directory: Path) -> Architecture | None:
    if gguf_in(directory) is not None:
        return open_checkpoint(str(directory)).architecture
    if not is_huggingface(directory):
        return open_trained(directory).model.arch
    config = read_config(directory)
    kind = str(config.get("model_type"))
    if kind in FAMILIES:
        checkpoint = HuggingFaceCheckpoint(directory)
        check_whole(checkpoint)
        return checkpoint.architecture
    return moe_model(config).arch if kind in MOE_FAMILIES else None


def row_length(
    models: Iterable[Described], wanted: int | None = None, earlier: int | None = None
) -> int | None:
    """Return the maximum number of tokens per row, equal for all models so that scores compare.

    Args:
        models: The models to compare.
        wanted: Number requested by the user, or None.
        earlier: Number used in an earlier evaluation of one of the models, or None.

    Returns:
        The requested number, else the shortest context length; None if neither is known.

    Raises:
        UpcyclingError: The requested number exceeds a model's context length.
    """
    known = [model for model in models if model.context_length is not None]
    shortest = min(known, key=lambda model: model.context_length or 0, default=None)
    if shortest is None or shortest.context_length is None:
        return wanted or earlier
    if wanted is not None and wanted > shortest.context_length:
        raise UpcyclingError(
            f"--max-length is {wanted}; expected at most the context length of {shortest.source}, "
            f"{shortest.context_length}."
        )
    return wanted or min(shortest.context_length, earlier or shortest.context_length)


def check_tokenizer(tokenizer: Any, model: Described) -> None:
    """Check that a model has an embedding for every token of a tokenizer.

    Args:
        tokenizer: A tokenizer of transformers.
        model: The model.

    Raises:
        UpcyclingError: A token has no embedding.
    """
    if model.vocab_size is None:
        return
    beyond = {
        token: index for token, index in tokenizer.get_vocab().items() if index >= model.vocab_size
    }
    if beyond:
        token = max(beyond, key=lambda token: beyond[token])
        raise UpcyclingError(
            f"The tokenizer {tokenizer.name_or_path} has {len(beyond)} tokens that {model.source} "
            f"has no embedding for ({token!r} is {beyond[token]}); expected ids below its "
            f"vocab_size, {model.vocab_size}. Take the model's own: --tokenizer DIR."
        )


def other_tokens(tokenizer: PreTrainedTokenizerBase, model: Described) -> str | None:
    """Return a warning if a tokenizer differs from the model's own tokenizer, else None."""
    own = other_tokenizer(tokenizer, model.source)
    if own is None:
        return None
    return (
        f"the tokenizer {tokenizer.name_or_path} gives texts other tokens than {own}, the one "
        f"beside {model.source}: what the model makes of them says little of it"
    )


def open_tokenizer(*sources: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the first checkpoint that has one.

    Raises:
        UpcyclingError: No checkpoint has a tokenizer, or the tokenizer cannot be read.
    """
    if find_directory(sources[0]) is None:  # not a checkpoint, so the user has named a tokenizer
        return load_tokenizer(named_tokenizer(sources[0]))
    directory = next(filter(None, map(tokenizer_directory, sources)), None)
    if directory is None:
        raise UpcyclingError(
            f"{sources[-1]} holds no tokenizer; expected one of {', '.join(NEEDED)}. "
            "Name its directory: --tokenizer DIR."
        )
    return load_tokenizer(directory)


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer has a chat template.

    Raises:
        UpcyclingError: There is no chat template.
    """
    if not tokenizer.chat_template:
        raise UpcyclingError(
            f"The tokenizer {tokenizer.name_or_path} has no chat template, which "
            "--apply-chat-template needs: leave it out, as for any model that was not trained to "
            "chat."
        )


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return the dtype with this name; None means the checkpoint's dtype.

    Raises:
        UpcyclingError: The dtype is not supported.
    """
    if name not in (None, *DTYPES):
        raise UpcyclingError(f"dtype is {name!r}; expected one of: {', '.join(DTYPES)}.")
    return None if name is None else getattr(torch, name)

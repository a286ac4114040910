"""What is checked before any model is loaded: tokenizer, context length, vocabulary."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from nemo_upcycle.checkpoint import HuggingFaceCheckpoint, is_huggingface, read_config
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
"""Names of the dtypes that models run in."""


@dataclass(frozen=True)
class Described:
    """A checkpoint, by its config alone.

    Attributes:
        source: What the user calls it.
        vocab_size: Tokens that it knows; None where its config does not say.
        context_length: Tokens of a row that it takes; None where its config does not say.
        arch: Its numbers, of a family that Megatron computes.
    """

    source: str
    vocab_size: int | None
    context_length: int | None
    arch: Architecture | None = None


def describe(source: str | Path) -> Described:
    """Read what a checkpoint's config says of tokens, and check a dense one's headers.

    Args:
        source: NeMo 2's, Megatron-LM's or Hugging Face's, or a run's directory.

    Raises:
        UpcyclingError: It cannot be read.
    """
    directory = resolve_trained(source)
    arch = _architecture(directory)
    if arch is not None:
        return Described(str(source), arch.vocab_size, arch.max_position_embeddings, arch)
    # The words of other families; composite models have their text model's apart.
    config = read_config(directory)
    config = config.get("text_config") or config
    lengths = (config.get(n) for n in ("n_positions", "max_position_embeddings", "n_ctx"))
    length = next((value for value in lengths if value is not None), None)
    return Described(str(source), config.get("vocab_size"), length)


def _architecture(directory: Path) -> Architecture | None:
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
    """Return how many tokens of a row all models are given: the same, or they do not compare.

    Args:
        models: The models to compare.
        wanted: What the user asks for.
        earlier: What a model had that was evaluated earlier.

    Returns:
        What is asked for, or the shortest context length; None where nothing says one.

    Raises:
        UpcyclingError: A model does not take as many as are asked for.
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
    """Check that a model knows every token of a tokenizer.

    Args:
        tokenizer: transformers'.
        model: The model.

    Raises:
        UpcyclingError: It does not.
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
    """Say that a tokenizer gives texts other tokens than the model's own; None if it does not."""
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
        UpcyclingError: There is none, or it cannot be read.
    """
    if find_directory(sources[0]) is None:  # checkpoints are there, so a user has named it
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
        UpcyclingError: It has not.
    """
    if not tokenizer.chat_template:
        raise UpcyclingError(
            f"The tokenizer {tokenizer.name_or_path} has no chat template, which "
            "--apply-chat-template needs: leave it out, as for any model that was not trained to "
            "chat."
        )


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return the dtype that a user names, None for the checkpoint's.

    Raises:
        UpcyclingError: It is none of those that models run in.
    """
    if name not in (None, *DTYPES):
        raise UpcyclingError(f"dtype is {name!r}; expected one of: {', '.join(DTYPES)}.")
    return None if name is None else getattr(torch, name)

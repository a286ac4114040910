"""A dense checkpoint as names, shapes, dtypes and `read_into(buffer, name, slice)`."""

from pathlib import Path

from nemo_upcycle.checkpoint.dense import DTYPE_BYTES, DenseCheckpoint, Piece, Span, TensorInfo
from nemo_upcycle.checkpoint.foreign import check_dense
from nemo_upcycle.checkpoint.gguf_file import GGUFCheckpoint, gguf_in
from nemo_upcycle.checkpoint.huggingface import (
    HuggingFaceCheckpoint,
    is_huggingface,
    read_config,
    resolve_directory,
)
from nemo_upcycle.checkpoint.megatron import MegatronCheckpoint, find_layout

__all__ = [
    "DTYPE_BYTES",
    "DenseCheckpoint",
    "GGUFCheckpoint",
    "HuggingFaceCheckpoint",
    "MegatronCheckpoint",
    "Piece",
    "Span",
    "TensorInfo",
    "gguf_in",
    "is_checkpoint",
    "is_huggingface",
    "open_checkpoint",
    "read_config",
]


def open_checkpoint(source: str) -> DenseCheckpoint:
    """Open a dense checkpoint of any format.

    Args:
        source: A directory in the format of Hugging Face, NeMo 2 or Megatron-LM, or with a GGUF
            file alone, or this file; or a hub name in the local Hugging Face cache.

    Returns:
        The checkpoint.

    Raises:
        UpcyclingError: There is no checkpoint, the checkpoint cannot be read, or is an MoE.
    """
    directory = resolve_directory(source)
    if (file := gguf_in(directory)) is not None:
        return GGUFCheckpoint(file)
    if is_huggingface(directory) or find_layout(directory) is None:
        checkpoint = HuggingFaceCheckpoint(directory)
        check_dense(checkpoint.config, directory)
        return checkpoint
    return MegatronCheckpoint(directory)


def is_checkpoint(directory: Path) -> bool:
    """Return whether a directory looks like a dense checkpoint of any format.

    Raises:
        UpcyclingError: The checkpoint cannot be read.
    """
    if is_huggingface(directory) or gguf_in(directory) is not None:
        return True
    return find_layout(directory) is not None

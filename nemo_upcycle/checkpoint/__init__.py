"""A dense checkpoint as names, shapes, dtypes and `read_into(buffer, name, slice)`."""

from pathlib import Path

from nemo_upcycle.checkpoint.dense import DTYPE_BYTES, DenseCheckpoint, Piece, Span, TensorInfo
from nemo_upcycle.checkpoint.foreign import check_dense
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
    "HuggingFaceCheckpoint",
    "MegatronCheckpoint",
    "Piece",
    "Span",
    "TensorInfo",
    "is_checkpoint",
    "is_huggingface",
    "open_checkpoint",
    "read_config",
]


def open_checkpoint(source: str) -> DenseCheckpoint:
    """Open a dense checkpoint of any format.

    Args:
        source: A directory of Hugging Face's, NeMo 2's or Megatron-LM's, or a hub name that is in
            the local Hugging Face cache.

    Returns:
        The checkpoint.

    Raises:
        UpcyclingError: There is none, or not one that can be read, or it is an MoE's.
    """
    directory = resolve_directory(source)
    if is_huggingface(directory) or find_layout(directory) is None:
        checkpoint = HuggingFaceCheckpoint(directory)
        check_dense(checkpoint.config, directory)
        return checkpoint
    return MegatronCheckpoint(directory)


def is_checkpoint(directory: Path) -> bool:
    """Return whether a directory looks like a dense checkpoint of any format.

    Raises:
        UpcyclingError: It is one that cannot be read.
    """
    return is_huggingface(directory) or find_layout(directory) is not None

"""What a few values of each tensor tell about a dense checkpoint, without reading all of it."""

import hashlib
from dataclasses import fields

from nemo_upcycle.checkpoint import DTYPE_BYTES, DenseCheckpoint
from nemo_upcycle.errors import UpcyclingError

VALUES = 64
"""Values of a row that are looked at, at most."""

ROWS = 64
"""Rows of the embeddings that are compared with the output layer's."""


def fingerprint(checkpoint: DenseCheckpoint) -> str:
    """Return what tells a dense checkpoint from others.

    Args:
        checkpoint: The dense checkpoint.

    Returns:
        A SHA-256 over its architecture and every tensor's name, shape, dtype, and first and last
        values.

    Raises:
        UpcyclingError: The checkpoint is damaged.
    """
    # Fields at their default do not count: new fields must not change what is known.
    arch = checkpoint.architecture
    said = [
        (field.name, getattr(arch, field.name))
        for field in fields(arch)
        if getattr(arch, field.name) != field.default
    ]
    return _digest(repr(said), checkpoint)


def weights_fingerprint(checkpoint: DenseCheckpoint) -> str:
    """Return what tells a checkpoint of any model from others, by its tensors alone.

    Args:
        checkpoint: The checkpoint, dense or MoE.

    Raises:
        UpcyclingError: The checkpoint is damaged.
    """
    return _digest("", checkpoint)


def _digest(begin: str, checkpoint: DenseCheckpoint) -> str:
    digest = hashlib.sha256(begin.encode())
    for name, info in sorted(checkpoint.tensors.items()):
        digest.update(repr((name, info)).encode())
        if info.dtype in DTYPE_BYTES and all(info.shape):
            digest.update(_row(checkpoint, name, 0) + _row(checkpoint, name, info.shape[0] - 1))
    checkpoint.close()
    return digest.hexdigest()


def check_tied(checkpoint: DenseCheckpoint) -> None:
    """Check that an output layer stored beside tied embeddings is the embeddings.

    Where the config is wrong about it, all rows differ; some are compared.

    Args:
        checkpoint: The dense checkpoint, whose shapes have been checked.

    Raises:
        UpcyclingError: It is not.
    """
    family = checkpoint.family
    is_tied = checkpoint.architecture.share_embeddings_and_output_weights
    if family.tied is None or not is_tied or family.tied[0] not in checkpoint.tensors:
        return
    output, embeddings = family.tied
    count = checkpoint.tensors[embeddings].shape[0]
    for row in (*range(0, count, -(-count // ROWS)), count - 1):
        if _row(checkpoint, output, row) != _row(checkpoint, embeddings, row):
            raise UpcyclingError(
                f"The config of {checkpoint.directory} says that the embeddings are tied, but "
                f"{output} differs from {embeddings} (row {row}). "
                "Set tie_word_embeddings to false in it, or get the config that belongs to it."
            )


def _row(checkpoint: DenseCheckpoint, name: str, row: int) -> bytes:
    """Return the first values of a row of a tensor, as bytes."""
    info = checkpoint.tensors[name]
    width = min(info.width, VALUES)
    buffer = bytearray(width * DTYPE_BYTES[info.dtype])
    checkpoint.read_into(memoryview(buffer), name, (row, row + 1), (0, width))
    return bytes(buffer)

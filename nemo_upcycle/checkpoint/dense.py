"""The interface of dense checkpoints: names, shapes, dtypes, and where the bytes are stored.

A tensor is one rectangle in a file, or several if ranks have saved it in parts. The formats differ
in how rectangles are found. Reading is the same for all: `pread` reads only the requested bytes,
into memory of the caller. Nothing is memory-mapped, so only the caller's buffer counts as memory of
the process, and all processes of a node share the page cache.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_upcycle.checkpoint.dtypes import DTYPE_BYTES
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture, Family, family_of

if TYPE_CHECKING:
    from typing_extensions import Self

Span = tuple[int, int]
"""Start and stop of a range."""

STRIP = 2**14
"""Values that are dequantized at a time: so few that torch starts no threads of its own."""

DEQUANTIZING_BYTES = 64 * STRIP
"""Memory of dequantizing, at most, beside the values themselves and one scale per row."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's description, from headers.

    Attributes:
        shape: [rows] or [rows, columns].
        dtype: safetensors' name: F32, BF16, F16, …
        sources: Number of checkpoints that are averaged; 1 for a plain tensor.
        packed: Of a tensor that is dequantized while read: bytes in which the file has so many
            values. Not part of the representation, by which checkpoints are told apart.
    """

    shape: tuple[int, ...]
    dtype: str
    sources: int = 1
    packed: tuple[int, int] | None = field(default=None, repr=False)

    @property
    def width(self) -> int:
        """Elements per row: the columns; 1 for a vector."""
        return self.shape[1] if len(self.shape) > 1 else 1

    @property
    def bytes(self) -> int:
        """Bytes of the tensor, once read from one checkpoint."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def stored(self, read: int) -> int:
        """Return the bytes in the file of a part of the tensor.

        Args:
            read: The part's bytes once read.
        """
        if self.packed is None:
            return read
        return read // DTYPE_BYTES[self.dtype] * self.packed[0] // self.packed[1]


@dataclass(frozen=True)
class Piece:
    """A rectangle of a tensor, stored contiguously by rows in a file.

    Attributes:
        file: Path relative to the checkpoint's directory.
        start: Byte offset of the first element.
        rows: Start and stop of the rows in the tensor.
        columns: Start and stop of the columns in the tensor; (0, 1) for a vector.
    """

    file: str
    start: int
    rows: Span
    columns: Span


Entry = tuple[TensorInfo, Piece]
"""A stored tensor: its description and its place."""


class DenseCheckpoint(ABC):
    """A dense checkpoint, opened for reading by slice.

    Attributes:
        directory: The checkpoint's directory.
        config: The config, with Hugging Face's `model_type` (`megatron` for Megatron's own).
    """

    directory: Path
    config: dict[str, Any]

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}

    @cached_property
    def family(self) -> Family:
        """The model family.

        Raises:
            UpcyclingError: The family is not one that can be upcycled.
        """
        return family_of(self.config)

    @cached_property
    def architecture(self) -> Architecture:
        """The architecture in the config.

        Raises:
            UpcyclingError: The architecture cannot be upcycled.
        """
        return self.family.architecture(self.config)

    @property
    def branches(self) -> "tuple[DenseCheckpoint, ...]":
        """The dense checkpoints that experts come from: this one."""
        return (self,)

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, from headers alone.

        Raises:
            UpcyclingError: A header is damaged.
        """

    @abstractmethod
    def pieces(self, name: str) -> Sequence[Piece]:
        """Return the rectangles that make up a tensor, with each element once.

        Raises:
            UpcyclingError: A header is damaged.
        """

    def read_into(self, buffer: memoryview, name: str, rows: Span, columns: Span | None) -> None:
        """Read a block of a tensor in the tensor's dtype; no other rows and columns are read.

        Args:
            buffer: Receives the block by rows; has exactly the block's size.
            name: The tensor.
            rows: Start and stop on the first axis.
            columns: Start and stop on the second axis; None for a vector or all columns.

        Raises:
            UpcyclingError: A file is gone or shorter than its header says.
        """
        info = self.tensors[name]
        columns = columns or (0, info.width)
        self.read_stored(buffer, self.pieces(name), DTYPE_BYTES[info.dtype], rows, columns)

    def read_stored(
        self, buffer: memoryview, pieces: Sequence[Piece], size: int, rows: Span, columns: Span
    ) -> None:
        """Read a block as the files have it.

        Args:
            buffer: Receives the block by rows; has exactly the block's size.
            pieces: The rectangles of the tensor.
            size: Bytes per value.
            rows: Start and stop on the first axis.
            columns: Start and stop on the second axis.

        Raises:
            UpcyclingError: A file is gone or shorter than its header says.
        """
        first, last = columns
        row_bytes = (last - first) * size
        for piece in pieces:
            low, high = max(rows[0], piece.rows[0]), min(rows[1], piece.rows[1])
            left, right = max(first, piece.columns[0]), min(last, piece.columns[1])
            if low >= high or left >= right:
                continue
            width = piece.columns[1] - piece.columns[0]
            source = piece.start + ((low - piece.rows[0]) * width + left - piece.columns[0]) * size
            target = (low - rows[0]) * row_bytes + (left - first) * size
            run = (right - left) * size
            count = high - low
            if run == width * size == row_bytes:  # whole rows on both sides: a single run
                run, count = run * count, 1
            for _ in range(count):
                self._read_run(piece.file, source, buffer[target : target + run])
                source, target = source + width * size, target + row_bytes

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; reading opens them again."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _read_run(self, file: str, start: int, buffer: memoryview) -> None:
        while len(buffer):
            try:
                count = os.preadv(self._open(file), [buffer], start)
            except OSError as error:
                raise UpcyclingError(
                    f"{self.directory / file} cannot be read: {error.strerror or error}. "
                    "Check the disk and the permissions, then start the same command again."
                ) from error
            if count == 0:
                raise UpcyclingError(
                    f"{self.directory / file} ends at byte {start}; the header promises more. The "
                    "file is damaged, incomplete or was changed meanwhile; get the file again."
                )
            start, buffer = start + count, buffer[count:]

    def _open(self, file: str) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(self.directory / file, os.O_RDONLY)
        return self._descriptors[file]

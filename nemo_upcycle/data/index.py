"""Megatron's `.idx` file, read without Megatron, to find the required size of the `.bin` file."""

import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from nemo_upcycle.data.manifest import sha256_of
from nemo_upcycle.errors import UpcyclingError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<QBQQ")  # version, dtype code, sequences, documents
HEADER_BYTES = len(MAGIC) + HEADER.size

DTYPES = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16,
}  # fmt: skip
"""Integer types of `megatron.core.datasets.indexed_dataset.DType` by code."""

CHUNK_BYTES = 2**24


@dataclass(frozen=True)
class Index:
    """The contents of an index.

    Attributes:
        dtype: Type of the token ids.
        sequences: Number of sequences.
        bin_bytes: Minimum size of the `.bin` file in bytes.
        sha256: Checksum of the index file.
    """

    dtype: np.dtype
    sequences: int
    bin_bytes: int
    sha256: str


def read_index(path: Path) -> Index:
    """Read an index; cached per process while the file's size and modification time are unchanged.

    Raises:
        UpcyclingError: The file is not an index, or is truncated.
    """
    stat = path.stat()
    return _read(path, stat.st_size, stat.st_mtime_ns)


@lru_cache
def _read(path: Path, size: int, _: int) -> Index:
    with path.open("rb") as file:
        start = file.read(HEADER_BYTES)
    expected = f"{path} is no index of a Megatron dataset"
    if len(start) < HEADER_BYTES or not start.startswith(MAGIC):
        raise UpcyclingError(f"{expected}: it does not begin like one.")
    version, code, sequences, documents = HEADER.unpack(start[len(MAGIC) :])
    if version != 1 or code not in DTYPES:
        raise UpcyclingError(f"{expected} of token ids: version {version}, type {code}.")
    if size < HEADER_BYTES + 12 * sequences + 8 * documents:
        raise UpcyclingError(
            f"{path} has {size:,} bytes, too few for the {sequences:,} documents that it says: it "
            "is cut off. Make the dataset anew, or copy it again."
        )
    dtype = np.dtype(DTYPES[code])
    bin_bytes = 0
    if sequences:
        lengths = np.memmap(path, np.int32, "r", HEADER_BYTES, (sequences,))
        at = HEADER_BYTES + lengths.nbytes
        pointers = np.memmap(path, np.int64, "r", at, (sequences,))
        bin_bytes = int((pointers + lengths * np.int64(dtype.itemsize)).max())
    return Index(dtype, sequences, bin_bytes, sha256_of(path))


def largest_id(path: Path, dtype: np.dtype, part: int = 0, parts: int = 1) -> int:
    """Return the largest token id in one of `parts` equal parts of a `.bin` file; -1 if empty."""
    total = path.stat().st_size // dtype.itemsize
    start, stop = total * part // parts, total * (part + 1) // parts
    largest = -1
    with path.open("rb") as file:
        file.seek(start * dtype.itemsize)
        while start < stop:
            ids = np.fromfile(file, dtype, min(stop - start, CHUNK_BYTES // dtype.itemsize))
            if not len(ids):
                break
            largest = max(largest, int(ids.max()))
            start += len(ids)
    return largest

"""Read files of `torch.save` without executing them: zips with one pickle and raw bytes.

archive/data.pkl   what was saved; tensors refer to their bytes by number
archive/data/0     the bytes of a tensor, never compressed
"""

import io
import math
import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.checkpoint.dense import DTYPE_BYTES
from nemo_upcycle.checkpoint.unpickle import unpickle
from nemo_upcycle.errors import UpcyclingError

_STORAGES = {
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
}
# Errors of zipfile, struct and the pickle reader on damaged bytes.
_DAMAGED = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    EOFError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
)
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, then the lengths of name and extra field


@dataclass(frozen=True)
class StoredTensor:
    """A tensor stored contiguously by rows in a file.

    Attributes:
        shape: The tensor's shape.
        dtype: safetensors' name of the dtype.
        start: Byte offset of the first element, counted from the zip's first byte.
    """

    shape: tuple[int, ...]
    dtype: str
    start: int


class _Window(io.RawIOBase):
    """A part of an open file, as a file."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length = descriptor, start, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError(f"a place {-base - offset} bytes before its start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._length - self._position))
        count = os.preadv(
            self._descriptor, [memoryview(buffer)[:size]], self._start + self._position
        )
        self._position += count
        return count


def read_pickle(path: Path, start: int = 0, length: int | None = None) -> Any:
    """Return the contents of a file of `torch.save`; see `unpickle`. Tensors are not read.

    Args:
        path: The file, or one that has it as a part.
        start: Byte offset of the part.
        length: Bytes of the part; None takes the whole file.

    Raises:
        UpcyclingError: The file is damaged.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size - start if length is None else length
            window = io.BufferedReader(_Window(file.fileno(), start, size))
            with zipfile.ZipFile(window) as archive:
                data = archive.read(_entry(archive, "data.pkl"))
    except _DAMAGED as error:
        raise _damaged(path, error) from error
    return unpickle(data, path)


def find_tensor(descriptor: int, start: int, length: int, where: str) -> StoredTensor:
    """Find the bytes of a tensor that `torch.save` has written into a part of a file.

    Args:
        descriptor: The file.
        start: Byte offset of the part.
        length: Bytes of the part.
        where: Description of the part, for the error.

    Returns:
        The tensor's location; the values are not read.

    Raises:
        UpcyclingError: The part is damaged, or is not one tensor with its rows in order.
    """
    window = io.BufferedReader(_Window(descriptor, start, length))
    try:
        with zipfile.ZipFile(window) as archive:
            tensor = unpickle(archive.read(_entry(archive, "data.pkl")), where)
            shape, dtype, key, skipped = _contiguous(tensor)
            entry = _entry(archive, f"data/{key}")
            _check_byte_order(archive)
        window.seek(entry.header_offset)
        signature, name, extra = _LOCAL_HEADER.unpack(window.read(_LOCAL_HEADER.size))
    except UpcyclingError:
        raise
    except _DAMAGED as error:
        raise _damaged(where, error) from error
    first = entry.header_offset + _LOCAL_HEADER.size + name + extra
    size = DTYPE_BYTES[dtype]
    if signature != b"PK\x03\x04" or first + entry.file_size > length:
        raise _damaged(where, "its directory and its contents differ")
    if (skipped + math.prod(shape)) * size > entry.file_size:
        raise _damaged(where, f"{entry.file_size} bytes are too few for {list(shape)} in {dtype}")
    return StoredTensor(shape, dtype, first + skipped * size)


def _contiguous(tensor: Any) -> tuple[tuple[int, ...], str, str, int]:
    """Return shape, dtype, storage and first element of a tensor as `torch.save` pickles it."""
    if getattr(tensor, "path", None) != "torch._utils._rebuild_tensor_v2":
        raise ValueError(f"it holds a {getattr(tensor, 'path', type(tensor).__name__)}")
    storage, skipped, shape, stride = tensor.args[:4]
    _, kind, key, *_ = storage
    if kind.path not in _STORAGES:
        raise ValueError(f"it holds a {kind.path}, which cannot be upcycled")
    expected = 1
    for count, step in zip(reversed(shape), reversed(stride), strict=True):
        if count != 1 and step != expected:
            raise ValueError(f"its strides are {list(stride)} for {list(shape)}")
        expected *= count
    if not (isinstance(skipped, int) and skipped >= 0 and str(key).isdecimal()):
        raise ValueError(f"it starts at element {skipped} of storage {key}")
    return tuple(shape), _STORAGES[kind.path], key, skipped


def _check_byte_order(archive: zipfile.ZipFile) -> None:
    for info in archive.infolist():  # older files do not say
        if info.filename.endswith("/byteorder") and archive.read(info) != b"little":
            raise ValueError("its bytes are not in little-endian order")


def _entry(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """Find an entry by name, without the archive's own name, which differs per file.

    Raises:
        ValueError: The entry is missing or compressed.
    """
    for info in archive.infolist():
        if info.filename.partition("/")[2] == name:
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise ValueError(f"{info.filename} is compressed or encrypted")
            return info
    raise ValueError(f"it has no {name}")


def _damaged(where: object, why: object) -> UpcyclingError:
    return UpcyclingError(
        f"{where} cannot be read as a file of torch.save: {why}. "
        "The file is damaged or incomplete; get the file again."
    )

"""The header of a GGUF file: metadata without long lists, and where each tensor's bytes are.

The package `gguf` reads a vocabulary word by word into arrays, which takes many seconds; here the
words are skipped, and only counted.

Source: https://github.com/ggml-org/ggml, docs/gguf.md, version 3.
"""

import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from nemo_upcycle.errors import UpcyclingError

_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Types of metadata, by number, as `struct` writes them."""
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_MOST = 2**32
"""Limit of counts and lengths: larger ones are damage."""
_LONGEST = 2**24
"""Limit of bytes in a text, such as a chat template."""


@dataclass(frozen=True)
class Listed:
    """A list of the metadata, of which only the length is known."""

    length: int


@dataclass(frozen=True)
class Placed:
    """A tensor of the file.

    Attributes:
        shape: Rows (and columns).
        kind: ggml's name of the type.
        block: Bytes and values of a block of the type.
        start: Byte offset of the first element.
    """

    shape: tuple[int, ...]
    kind: str
    block: tuple[int, int]
    start: int

    @property
    def end(self) -> int:
        """Byte offset after the last element."""
        return self.start + prod(self.shape) // self.block[1] * self.block[0]


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Placed]]:
    """Read the header.

    Args:
        path: The file.

    Returns:
        The metadata, and the tensors by name.

    Raises:
        UpcyclingError: The file is not GGUF, or shorter than the header says.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            fields, tensors = _read(file)
    except OSError as error:
        raise UpcyclingError(
            f"{path} cannot be read: {error.strerror}. Check the disk and the permissions."
        ) from error
    except (ValueError, TypeError, KeyError, ArithmeticError, struct.error) as error:
        raise _damaged(path, f"its header is not one ({error})") from error
    end = max((tensor.end for tensor in tensors.values()), default=0)
    if end > size:
        raise _damaged(path, f"it has {size} bytes of the {end} that its header says")
    return fields, tensors


def _read(file: BinaryIO) -> tuple[dict[str, Any], dict[str, Placed]]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    magic, version = file.read(4), _number(file, "I")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"magic {magic!r}, version {version}")
    tensor_count, field_count = _count(file), _count(file)
    fields = {_string(file): _value(file, _number(file, "I")) for _ in range(field_count)}
    described = [_described(file) for _ in range(tensor_count)]
    alignment = int(fields.get("general.alignment", _ALIGNMENT))
    start = -(-file.tell() // alignment) * alignment
    tensors = {}
    for name, shape, number, offset in described:
        kind = GGMLQuantizationType(number)
        values, size = GGML_QUANT_SIZES[kind]
        if not 1 <= len(shape) <= 2 or shape[-1] % values:
            raise ValueError(f"{name} is {list(shape)} in {kind.name}")
        tensors[name] = Placed(shape, kind.name, (size, values), start + offset)
    return fields, tensors


def _described(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name = _string(file)
    dimensions = min(_number(file, "I"), 8)
    shape = tuple(reversed([_count(file) for _ in range(dimensions)]))  # columns come first
    return name, shape, _number(file, "I"), _number(file, "Q")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _number(file, _NUMBERS[kind])
    inner, length = _number(file, "I"), _count(file)
    if inner == _ARRAY:
        raise ValueError("a list of lists")
    for _ in range(length if inner == _STRING else 0):
        file.seek(_count(file), os.SEEK_CUR)
    if inner != _STRING:
        file.seek(length * struct.calcsize(f"<{_NUMBERS[inner]}"), os.SEEK_CUR)
    return Listed(length)


def _string(file: BinaryIO) -> str:
    length = _count(file)
    raw = file.read(min(length, _LONGEST))
    if len(raw) < length:
        raise ValueError("it ends in a name")
    return raw.decode("utf-8", "replace")


def _count(file: BinaryIO) -> int:
    count = _number(file, "Q")
    if count >= _MOST:
        raise ValueError(f"a length of {count}")
    return count


def _number(file: BinaryIO, kind: str) -> Any:
    return struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))[0]


def _damaged(path: Path, why: str) -> UpcyclingError:
    return UpcyclingError(
        f"{path} cannot be read as GGUF, llama.cpp's format: {why}. The file is damaged or "
        "incomplete; get the file again."
    )

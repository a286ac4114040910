"""The header of a safetensors file, read and written: where each tensor's bytes are."""

import json
import math
import os
import struct
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from nemo_upcycle.checkpoint.dense import DTYPE_BYTES, Entry, Piece, TensorInfo
from nemo_upcycle.errors import UpcyclingError

PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")
"""First bytes of files of `torch.save`, in the new and the old format."""


def read_header(directory: Path, file: str) -> dict[str, Entry]:
    """Read the byte ranges of the tensors in a safetensors file.

    The safetensors library gives names and shapes but no byte ranges, imports torch, and maps the
    file into memory. The header is 8 bytes of length, and JSON.

    Args:
        directory: The checkpoint's directory.
        file: The file's name in the directory.

    Returns:
        Each tensor's description and location, by name.

    Raises:
        UpcyclingError: The file is not safetensors, or shorter than the header says.

    Source: https://github.com/huggingface/safetensors, "Format".
    """
    path = directory / file
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start, brace = stream.read(8), stream.read(1)
            length = int.from_bytes(start, "little")
            # The length of a header may begin as a pickle does: 640 is b"\x80\x02".
            if start.startswith(PICKLES) and brace != b"{":
                raise _damaged(path, "it is a pickled PyTorch file, which can run code when loaded")
            if start == b"version ":
                raise _damaged(path, "it is a Git LFS pointer; `git lfs pull` gets the file itself")
            if len(start) < 8 or length > size - 8:
                raise _damaged(path, f"it has {size} bytes, fewer than its header alone")
            header = json.loads(brace + stream.read(max(0, length - 1)))
        header.pop("__metadata__", None)
        entries = {name: _entry(file, 8 + length, **entry) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except OSError as error:
        raise UpcyclingError(
            f"{path} cannot be read: {error.strerror}. Check the disk and the permissions."
        ) from error
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        if isinstance(error, UpcyclingError):
            raise
        raise _damaged(path, f"its header is not one ({error})") from error
    places = sorted(entry["data_offsets"] for entry in header.values())
    if any(next_start < stop for (_, stop), (next_start, _) in pairwise(places)):
        raise _damaged(path, "its tensors overlap")
    if 8 + length + end > size:
        raise _damaged(path, f"it has {size} bytes of the {8 + length + end} that its header says")
    return entries


def header_of(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Return what stands before the tensors of a safetensors file.

    Args:
        infos: The tensors, by name, in the file's order.
        metadata: Texts by name.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, info in infos.items():
        stop = position + info.bytes
        offsets = [position, stop]
        entries[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
        position = stop
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _entry(file: str, data: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Entry:
    info = TensorInfo(tuple(shape), dtype)
    start, stop = data_offsets
    if any(size < 0 for size in shape) or not 0 <= start <= stop:
        raise ValueError(f"shape {shape} at bytes {data_offsets}")
    # Dtypes that cannot be upcycled are refused by name later.
    if dtype in DTYPE_BYTES and math.prod(shape) * DTYPE_BYTES[dtype] != stop - start:
        raise ValueError(f"shape {shape} in {dtype} at bytes {data_offsets}")
    rows = shape[0] if shape else 1
    return info, Piece(file, data + start, (0, rows), (0, info.width))


def _damaged(path: Path, why: str) -> UpcyclingError:
    return UpcyclingError(
        f"{path} cannot be read as safetensors: {why}. The file is damaged or incomplete; get the "
        "file again."
    )

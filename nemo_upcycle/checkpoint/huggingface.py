"""Read a Hugging Face directory by slice: `config.json` and one or many safetensors files.

Nothing is unpickled: a directory with only `pytorch_model*.bin` is refused.
"""

import json
import math
import os
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any

from nemo_upcycle.checkpoint.dense import DTYPE_BYTES, DenseCheckpoint, Piece, TensorInfo
from nemo_upcycle.errors import UpcyclingError, listing

INDEX = "model.safetensors.index.json"
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")
"""How files of `torch.save` begin, new and old."""


def resolve_directory(source: str | Path) -> Path:
    """Return the local directory of a checkpoint: a path, or a hub name already downloaded.

    Raises:
        UpcyclingError: There is no such directory.
    """
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            (path / "config.json").exists()
            next(path.iterdir(), None)
            return path
        exists = path.exists()
    except OSError as error:
        raise UpcyclingError(
            f"{error.filename or path} cannot be read: {error.strerror}. Check the permissions."
        ) from error
    if exists:
        raise UpcyclingError(
            f"{path} is a file; expected the directory that holds config.json and *.safetensors."
        )
    found = None if path.is_absolute() else _cached_snapshot(str(source))
    if found is None:
        raise UpcyclingError(
            f"No dense checkpoint at '{source}': expected a directory with config.json and "
            "*.safetensors. Check the path (relative paths start where the command runs); "
            "fetch a model from the Hugging Face hub first with `hf download NAME`."
        )
    return found


def _cached_snapshot(name: str) -> Path | None:
    """Look a hub name up in the local cache; never goes to the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def read_config(directory: Path) -> dict[str, Any]:
    """Read `config.json`.

    Raises:
        UpcyclingError: It is missing or not JSON.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UpcyclingError(
            f"{directory} has no config.json; expected a Hugging Face checkpoint directory."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UpcyclingError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(config, dict):
        raise UpcyclingError(f"{path} holds a {type(config).__name__}; expected a JSON object.")
    return config


class HuggingFaceCheckpoint(DenseCheckpoint):
    """A dense checkpoint in Hugging Face's layout.

    Args:
        source: A directory, or a hub name that is in the local cache.

    Raises:
        UpcyclingError: The directory or its files are missing, damaged or not safetensors.
    """

    def __init__(self, source: str | Path) -> None:
        super().__init__()
        self.directory = resolve_directory(source)
        self.config = read_config(self.directory)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by name, from the files' headers."""
        return {name: info for name, (info, _) in self._entries.items()}

    def pieces(self, name: str) -> tuple[Piece]:
        """Return the one rectangle that a tensor is."""
        return (self._entries[name][1],)

    @cached_property
    def _entries(self) -> dict[str, tuple[TensorInfo, Piece]]:
        entries: dict[str, tuple[TensorInfo, Piece]] = {}
        for file in self._files():
            for name, entry in read_header(self.directory, file).items():
                if name in entries:
                    raise UpcyclingError(
                        f"Tensor {name} is in both {entries[name][1].file} and {file} of "
                        f"{self.directory}; expected it once. Remove the stale file."
                    )
                entries[name] = entry
        self._check_index(entries)
        return entries

    def _files(self) -> list[str]:
        index = self._index()
        files = sorted(set(index.values())) if index else self._glob()
        outside = [file for file in files if Path(file).name != file]
        if outside:
            raise UpcyclingError(
                f"{self.directory / INDEX} names files outside its directory: "
                f"{listing(outside)}; expected plain file names."
            )
        missing = [file for file in files if not (self.directory / file).is_file()]
        if missing:
            raise UpcyclingError(
                f"{self.directory} lacks {len(missing)} of the {len(files)} files its index "
                f"names: {listing(missing)}. Download the checkpoint again."
            )
        return files

    def _glob(self) -> list[str]:
        files = sorted(path.name for path in self.directory.glob("*.safetensors"))
        if files:
            return files
        pickles = sorted(path.name for path in self.directory.glob("*.bin"))
        if pickles:
            raise UpcyclingError(
                f"{self.directory} holds pickled weights ({listing(pickles)}), which can run "
                "code when loaded; expected *.safetensors. Convert it with "
                "save_pretrained(..., safe_serialization=True)."
            )
        raise UpcyclingError(
            f"{self.directory} holds no *.safetensors; expected a Hugging Face checkpoint."
        )

    def _index(self) -> dict[str, str]:
        path = self.directory / INDEX
        if not path.exists():
            return {}
        try:
            index = dict(json.loads(path.read_text())["weight_map"])
            return {name: str(PurePath(file)) for name, file in index.items()}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UpcyclingError(
                f"{path} cannot be read: {error!r}; expected JSON with a weight_map."
            ) from error

    def _check_index(self, entries: Mapping[str, object]) -> None:
        missing = [name for name in self._index() if name not in entries]
        if missing:
            raise UpcyclingError(
                f"The index of {self.directory} names tensors that its files lack: "
                f"{listing(missing)}. Download the checkpoint again."
            )


def read_header(directory: Path, file: str) -> dict[str, tuple[TensorInfo, Piece]]:
    """Read where the tensors of a safetensors file lie.

    The safetensors library tells names and shapes but not places, imports torch for it, and maps
    the file into memory; the header is 8 bytes of length and JSON.

    Args:
        directory: The checkpoint's directory.
        file: The file's name in it.

    Returns:
        Each tensor and its place, by name.

    Raises:
        UpcyclingError: The file is not safetensors, or shorter than it says.

    Source: https://github.com/huggingface/safetensors, "Format".
    """
    path = directory / file
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if start.startswith(PICKLES):
                raise _damaged(path, "it is a pickled PyTorch file, which can run code when loaded")
            if start == b"version ":
                raise _damaged(path, "it is a Git LFS pointer; `git lfs pull` gets the file itself")
            if len(start) < 8 or length > size - 8:
                raise _damaged(path, f"it has {size} bytes, fewer than its header alone")
            header = json.loads(stream.read(length))
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


def _entry(
    file: str, data: int, dtype: str, shape: list[int], data_offsets: list[int]
) -> tuple[TensorInfo, Piece]:
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
        f"{path} cannot be read as safetensors: {why}. It is damaged or incomplete; get it again."
    )

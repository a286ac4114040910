"""Read a Hugging Face directory by slice: `config.json` and one or many safetensors files.

Nothing is unpickled: a directory with only `pytorch_model*.bin` is refused.
"""

import json
import math
import os
from collections.abc import Collection
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any

from nemo_upcycle.checkpoint.dense import DTYPE_BYTES, DenseCheckpoint, Piece, TensorInfo
from nemo_upcycle.checkpoint.foreign import (
    check_no_adapter,
    check_not_quantised,
    check_not_quantised_tensors,
    get_again,
    held_instead,
)
from nemo_upcycle.errors import UpcyclingError, listing

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BASE = "model"
"""Name of the model without the output layer in transformers, for all supported families."""
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")
"""First bytes of files of `torch.save`, in the new and the old format."""

_Entry = tuple[TensorInfo, Piece]


def resolve_directory(source: str | Path) -> Path:
    """Return the local directory of a checkpoint: a path, or a hub name already downloaded.

    Raises:
        UpcyclingError: There is no such directory.
    """
    directory = find_directory(source)
    if directory is None:
        raise UpcyclingError(
            f"No dense checkpoint at '{source}': expected a directory with config.json and "
            "*.safetensors. Check the path (relative paths start where the command runs); "
            "fetch a model from the Hugging Face hub first with `hf download NAME`."
        )
    return directory


def is_huggingface(directory: Path) -> bool:
    """Return whether a directory is in Hugging Face's format, with a config.json."""
    return (directory / "config.json").is_file()


def find_directory(source: str | Path) -> Path | None:
    """Return the local directory of a checkpoint, None if there is none on this machine.

    Args:
        source: An absolute or relative path, also with `~`, or a hub name already downloaded.

    Raises:
        UpcyclingError: The source is a file, or cannot be read.
    """
    path = Path(os.path.expanduser(source))
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
    return None if path.is_absolute() else _cached_snapshot(str(source))


def _cached_snapshot(name: str) -> Path | None:
    """Look up a hub name in the local cache, without the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def read_config(directory: Path) -> dict[str, Any]:
    """Read `config.json`.

    Raises:
        UpcyclingError: The file is missing or not JSON.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))  # a byte order mark is not JSON
    except FileNotFoundError:
        what, way_out = held_instead(directory) or ("nothing that is known", get_again(directory))
        raise UpcyclingError(
            f"{directory} has no config.json; expected a Hugging Face checkpoint directory. "
            f"It holds {what}. {way_out}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also a number too long
        raise UpcyclingError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(config, dict):
        raise UpcyclingError(f"{path} holds a {type(config).__name__}; expected a JSON object.")
    return config


class HuggingFaceCheckpoint(DenseCheckpoint):
    """A dense checkpoint in Hugging Face's layout.

    Args:
        source: A directory, or a hub name in the local cache.

    Raises:
        UpcyclingError: The directory or its files are missing, damaged or not safetensors.
    """

    def __init__(self, source: str | Path) -> None:
        super().__init__()
        self.directory = resolve_directory(source)
        self.config = read_config(self.directory)
        check_no_adapter(self.directory)
        check_not_quantised(self.config, self.directory)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by name, from the files' headers."""
        return {name: info for name, (info, _) in self._entries.items()}

    def pieces(self, name: str) -> tuple[Piece]:
        """Return a tensor's only rectangle."""
        return (self._entries[name][1],)

    @cached_property
    def _entries(self) -> dict[str, _Entry]:
        entries: dict[str, _Entry] = {}
        for file in self._files():
            for name, entry in read_header(self.directory, file).items():
                if name in entries:
                    raise UpcyclingError(
                        f"Tensor {name} is in both {entries[name][1].file} and {file} of "
                        f"{self.directory}; expected each tensor once. Remove the stale file."
                    )
                entries[name] = entry
        entries = self._as_indexed(entries)
        check_not_quantised_tensors(entries, self.directory)
        if _is_base_model(entries):
            return {f"{BASE}.{name}": entry for name, entry in entries.items()}
        return entries

    def _files(self) -> list[str]:
        """Return the files that transformers reads; others do not belong to the model."""
        if self.config.get("transformers_weights"):
            raise UpcyclingError(
                f"The config.json of {self.directory} says transformers_weights="
                f"{self.config['transformers_weights']!r}; expected {WEIGHTS} or {INDEX}. "
                "Load the model with transformers and save it with save_pretrained."
            )
        if (self.directory / WEIGHTS).is_file():
            return [WEIGHTS]
        index = self._index()
        if not index:
            raise self._no_weights()
        files = sorted(set(index.values()))
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
                f"names: {listing(missing)}. {get_again(self.directory)}"
            )
        return files

    def _no_weights(self) -> UpcyclingError:
        what, way_out = held_instead(self.directory) or (
            "no *.safetensors",
            get_again(self.directory),
        )
        return UpcyclingError(
            f"{self.directory} holds {what}; expected {WEIGHTS}, or {INDEX} and the files that it "
            f"names. {way_out}"
        )

    def _index(self) -> dict[str, str]:
        path = self.directory / INDEX
        if not path.exists():
            return {}
        try:
            index = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
            files = {name: str(PurePath(file)) for name, file in index.items()}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UpcyclingError(
                f"{path} cannot be read: {error!r}; expected JSON with a weight_map."
            ) from error
        if not files:
            raise UpcyclingError(
                f"{path} has an empty weight_map; expected the file of each tensor. "
                f"{get_again(self.directory)}"
            )
        return files

    def _as_indexed(self, entries: dict[str, _Entry]) -> dict[str, _Entry]:
        """Leave out tensors that the index does not name, as transformers does."""
        if (self.directory / WEIGHTS).is_file():
            return entries
        index = self._index()
        missing = [name for name in index if name not in entries]
        if missing:
            raise UpcyclingError(
                f"The index of {self.directory} names tensors that its files lack: "
                f"{listing(missing)}. {get_again(self.directory)}"
            )
        return {name: entries[name] for name in index}


def _is_base_model(names: Collection[str]) -> bool:
    """Return whether transformers would read the tensors as a model without an output layer.

    AutoModel saves names without the base model's prefix. An output layer beside such names is
    refused by transformers, and by the check of all names here.
    """
    return {"embed_tokens.weight", "norm.weight"} <= set(names) and not any(
        name.startswith((BASE, "lm_head")) for name in names
    )


def read_header(directory: Path, file: str) -> dict[str, _Entry]:
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


def _entry(file: str, data: int, dtype: str, shape: list[int], data_offsets: list[int]) -> _Entry:
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

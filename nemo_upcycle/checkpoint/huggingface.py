"""Read a Hugging Face directory by slice: `config.json` and one or many safetensors files.

Nothing is unpickled: a directory with only `pytorch_model*.bin` is refused.
"""

import json
import os
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, TypeVar

from nemo_upcycle.checkpoint.dense import DenseCheckpoint, Entry, Piece, Span, TensorInfo
from nemo_upcycle.checkpoint.foreign import check_no_adapter, get_again, held_instead
from nemo_upcycle.checkpoint.fp8 import ScaledWeight
from nemo_upcycle.checkpoint.quantized import (
    check_known,
    dequantized,
    quantization_of,
    without_quantization,
)
from nemo_upcycle.checkpoint.safetensors_header import read_header
from nemo_upcycle.errors import UpcyclingError, listing

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BASE = "model"
"""Name of the model without the output layer in transformers, for all supported families."""

_T = TypeVar("_T")


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
        source: An absolute or relative path, also with `~`, or a hub name already downloaded. A
            GGUF file means its directory, if there is no other in it.

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
    if exists and path.suffix == ".gguf" and list(path.parent.glob("*.gguf")) == [path]:
        return path.parent
    if exists:
        raise UpcyclingError(
            f"{path} is a file; expected the directory that holds config.json and *.safetensors, "
            "or one GGUF file alone."
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

    Weights in FP8 appear dequantized, and their scales not at all; see `quantized.py`.

    Args:
        source: A directory, or a hub name in the local cache.

    Raises:
        UpcyclingError: The directory or its files are missing, damaged, not safetensors or
            quantized in another way than FP8.
    """

    def __init__(self, source: str | Path) -> None:
        super().__init__()
        self.directory = resolve_directory(source)
        config = read_config(self.directory)
        check_no_adapter(self.directory)
        self._quantization = quantization_of(config)
        self.config = without_quantization(config)
        if self._quantization is None:
            return
        if self.has_weights:  # whether these are quantized is known at once, not while training
            _ = self._model
        else:
            check_known(self._quantization, str(self.directory))

    @property
    def has_weights(self) -> bool:
        """Whether there are weights at all, readable or not."""
        return any((self.directory / name).is_file() for name in (WEIGHTS, INDEX))

    @property
    def scaled(self) -> dict[str, ScaledWeight]:
        """The weights in FP8 by name."""
        return self._model[1]

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by name, from the files' headers."""
        return {name: info for name, (info, _) in self._model[0].items()}

    def pieces(self, name: str) -> tuple[Piece]:
        """Return a tensor's only rectangle."""
        return (self._model[0][name][1],)

    def read_into(self, buffer: memoryview, name: str, rows: Span, columns: Span | None) -> None:
        """Read a block of a tensor, dequantized if in FP8; see `DenseCheckpoint.read_into`."""
        scaled = self.scaled.get(name)
        if scaled is None:
            super().read_into(buffer, name, rows, columns)
        else:
            scaled.read_into(self, buffer, rows, columns or (0, self.tensors[name].width))

    @cached_property
    def _model(self) -> tuple[dict[str, Entry], dict[str, ScaledWeight]]:
        """The model's tensors, and those of them that have scales."""
        where = str(self.directory)
        entries, scaled = dequantized(self._entries, self._quantization, self.config, where)
        if _is_base_model(entries):
            return _with_base(entries), _with_base(scaled)
        return entries, scaled

    @property
    def _entries(self) -> dict[str, Entry]:
        """The tensors that the files have."""
        entries: dict[str, Entry] = {}
        for file in self._files():
            for name, entry in read_header(self.directory, file).items():
                if name in entries:
                    raise UpcyclingError(
                        f"Tensor {name} is in both {entries[name][1].file} and {file} of "
                        f"{self.directory}; expected each tensor once. Remove the stale file."
                    )
                entries[name] = entry
        return self._as_indexed(entries)

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

    def _as_indexed(self, entries: dict[str, Entry]) -> dict[str, Entry]:
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


def _with_base(tensors: Mapping[str, _T]) -> dict[str, _T]:
    return {f"{BASE}.{name}": tensor for name, tensor in tensors.items()}

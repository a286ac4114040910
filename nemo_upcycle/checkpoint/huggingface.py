"""Read a Hugging Face directory by slice: `config.json` and one or many safetensors files.

Nothing is unpickled: a directory with only `pytorch_model*.bin` is refused.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_upcycle.errors import UpcyclingError, listing

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, known without reading it."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    """safetensors' name: F32, BF16, F16, …"""


def resolve_directory(source: str | Path) -> Path:
    """Return the local directory of a checkpoint: a path, or a hub name already downloaded.

    Raises:
        UpcyclingError: There is no such directory.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
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


class HuggingFaceCheckpoint:
    """A dense checkpoint in Hugging Face's layout.

    Args:
        source: A directory, or a hub name that is in the local cache.

    Raises:
        UpcyclingError: The directory or its files are missing, damaged or not safetensors.
    """

    def __init__(self, source: str | Path) -> None:
        self.directory = resolve_directory(source)
        self.config = read_config(self.directory)
        self._open_files: dict[str, Any] = {}

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by name, from the files' headers."""
        tensors: dict[str, TensorInfo] = {}
        for file in self._files():
            handle = self._open(file)
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                if name in tensors:
                    raise UpcyclingError(
                        f"Tensor {name} is in both {tensors[name].file} and {file} of "
                        f"{self.directory}; expected it once. Remove the stale file."
                    )
                header = handle.get_slice(name)
                tensors[name] = TensorInfo(file, tuple(header.get_shape()), header.get_dtype())
        self._check_index(tensors)
        return tensors

    def read(
        self, name: str, rows: tuple[int, int], columns: tuple[int, int] | None = None
    ) -> "torch.Tensor":
        """Read a block of a tensor, in its own dtype, onto the CPU.

        Args:
            name: The tensor.
            rows: Start and stop on the first axis.
            columns: Start and stop on the second axis; None for a vector or all columns.

        Returns:
            The block; only its bytes are read from the file.

        Raises:
            UpcyclingError: The block holds NaN or Inf.
        """
        import torch

        handle = self._open(self.tensors[name].file).get_slice(name)
        if columns is None:
            block: torch.Tensor = handle[rows[0] : rows[1]]
        else:
            block = handle[rows[0] : rows[1], columns[0] : columns[1]]
        if not torch.isfinite(block).all():
            raise UpcyclingError(
                f"Tensor {name} of {self.directory} holds NaN or Inf in rows "
                f"{rows[0]}:{rows[1]}; expected finite weights. The checkpoint is damaged."
            )
        return block

    def close(self) -> None:
        """Close the files."""
        self._open_files.clear()

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
            return dict(json.loads(path.read_text())["weight_map"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UpcyclingError(
                f"{path} cannot be read: {error!r}; expected JSON with a weight_map."
            ) from error

    def _check_index(self, tensors: dict[str, TensorInfo]) -> None:
        missing = [name for name in self._index() if name not in tensors]
        if missing:
            raise UpcyclingError(
                f"The index of {self.directory} names tensors that its files lack: "
                f"{listing(missing)}. Download the checkpoint again."
            )

    def _open(self, file: str) -> Any:
        if file not in self._open_files:
            from safetensors import SafetensorError, safe_open

            try:
                self._open_files[file] = safe_open(self.directory / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UpcyclingError(
                    f"{self.directory / file} cannot be read as safetensors: {error}. "
                    "It is damaged or incomplete; download it again."
                ) from error
        return self._open_files[file]

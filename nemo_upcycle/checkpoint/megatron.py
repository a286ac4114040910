"""Read dense checkpoints of NeMo 2 and Megatron-LM by slice, saved under any mapping (torch_dist).

A directory's `.metadata` says which rectangles of which tensors are in which `.distcp` file, each
as a small file of `torch.save`. Nothing is unpickled in the usual sense: see `unpickle.py`.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from nemo_upcycle.checkpoint.beside import with_unsaid
from nemo_upcycle.checkpoint.dense import DTYPE_BYTES, DenseCheckpoint, Piece, Span, TensorInfo
from nemo_upcycle.checkpoint.foreign import no_checkpoint
from nemo_upcycle.checkpoint.huggingface import resolve_directory
from nemo_upcycle.checkpoint.megatron_config import read_args, read_model_yaml, read_run_config
from nemo_upcycle.checkpoint.megatron_metadata import Chunk, StoredTensor, read_metadata
from nemo_upcycle.checkpoint.torch_save import find_tensor
from nemo_upcycle.errors import UpcyclingError

TRACKER = "latest_checkpointed_iteration.txt"
RUN_CONFIG = "run_config.yaml"
"""What Megatron-Bridge writes into the directory of a checkpoint."""

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class Layout:
    """Directories of a checkpoint's parts.

    Attributes:
        weights: Directory of `.metadata` and the `.distcp` files.
        context: Directory of NeMo 2's `model.yaml` and tokenizer; None for Megatron-LM.
    """

    weights: Path
    context: Path | None


def find_layout(directory: Path) -> Layout | None:
    """Find the parts of a checkpoint.

    Args:
        directory: A NeMo 2 checkpoint or its `weights`; Megatron-LM's `iter_…` or the parent
            directory.

    Returns:
        The layout; None if this is no Megatron checkpoint.

    Raises:
        UpcyclingError: The checkpoint cannot be read.
    """
    if (directory / TRACKER).is_file():
        directory = _latest(directory)
    root = directory.resolve()
    if (directory / "weights").is_dir():
        weights = directory / "weights"
    else:
        weights, root = directory, root.parent if root.name == "weights" else root
    context = root / "context" if (root / "context").is_dir() else None
    if any(weights.glob("mp_rank_*")):
        raise UpcyclingError(
            f"{weights} is in Megatron-LM's legacy format (mp_rank_* directories), readable only "
            "under the same mapping; expected torch_dist. Save with --ckpt-format torch_dist."
        )
    if not any((weights / name).exists() for name in (".metadata", "metadata.json", "common.pt")):
        return None
    if Path(f"{root}-unfinished").exists():
        raise UpcyclingError(
            f"{root} was not saved completely: the marker {root.name}-unfinished exists. Give an "
            "older checkpoint."
        )
    return Layout(weights, context)


def _latest(directory: Path) -> Path:
    text = (directory / TRACKER).read_text(errors="replace").strip()
    number = text.isdecimal() and len(text) < 20
    name = f"iter_{text.zfill(7)}" if number else "release"
    if not (number or text == "release") or not (directory / name).is_dir():
        raise UpcyclingError(
            f"{directory / TRACKER} says {text[:40]!r}; expected an iteration with a directory "
            "beside the file. Give the directory of an iteration."
        )
    return directory / name


class MegatronCheckpoint(DenseCheckpoint):
    """A checkpoint in Megatron-Core's distributed format, with Megatron's names.

    Layers and experts stacked in one tensor appear as separate tensors, and the vocabulary without
    padding.

    Args:
        source: A NeMo 2 checkpoint or its `weights`; Megatron-LM's `iter_…` or the parent
            directory.
        experts: Whether an MoE is allowed.

    Attributes:
        context: NeMo 2's directory of config and tokenizer, None for Megatron-LM.

    Raises:
        UpcyclingError: The checkpoint is unfinished, incomplete, damaged, of another format, or an
            MoE that is not allowed.
    """

    def __init__(self, source: str | Path, experts: bool = False) -> None:
        super().__init__()
        directory = resolve_directory(source)
        layout = find_layout(directory)
        if layout is None:
            raise no_checkpoint(directory)
        self.directory = layout.weights
        _check_format(self.directory)
        if layout.context is not None:
            config = read_model_yaml(layout.context / "model.yaml")
        elif (self.directory / RUN_CONFIG).is_file():
            config = read_run_config(self.directory / RUN_CONFIG)
        else:
            config = read_args(self.directory)
        self.context = layout.context
        self._stored = read_metadata(self.directory, experts)
        self.config = self._with_vocabulary(with_unsaid(config, self.directory))
        self._pieces: dict[str, list[Piece]] = {}

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by name, the vocabulary without padding."""
        tensors = {name: stored.info for name, stored in self._stored.items()}
        real = self.config["vocab_size"]
        for name in VOCABULARY:
            if name in tensors and tensors[name].shape[0] > real:
                tensors[name] = TensorInfo((real, *tensors[name].shape[1:]), tensors[name].dtype)
        return tensors

    def pieces(self, name: str) -> Sequence[Piece]:
        """Return the rectangles that make up a tensor; each is located on first read."""
        if name not in self._pieces:
            stored = self._stored[name]
            self._pieces[name] = [self._piece(stored, *chunk) for chunk in stored.chunks]
        return self._pieces[name]

    def _piece(self, stored: StoredTensor, chunk: Chunk, index: int) -> Piece:
        stacked = len(chunk.sizes) - len(stored.info.shape)
        spans = [
            (offset, offset + size)
            for offset, size in zip(chunk.offsets[stacked:], chunk.sizes[stacked:], strict=True)
        ]
        rows, columns = (*spans, (0, 1), (0, 1))[:2]
        skipped = index * math.prod(chunk.sizes[stacked:])
        find = partial(self._find, chunk, skipped, stored.info.dtype)
        return _LazyPiece(chunk.file, rows, columns, find)

    def _find(self, chunk: Chunk, skipped: int, dtype: str) -> int:
        """Return the byte offset in the file of an element of a chunk."""
        where = f"{self.directory / chunk.file} from byte {chunk.start} on"
        try:
            descriptor = self._open(chunk.file)
        except OSError as error:
            raise UpcyclingError(f"{where} cannot be read: {error.strerror}.") from error
        tensor = find_tensor(descriptor, chunk.start, chunk.length, where)
        if (tensor.shape, tensor.dtype) != (chunk.sizes, dtype):
            raise UpcyclingError(
                f"{where} holds {list(tensor.shape)} in {tensor.dtype}; .metadata says "
                f"{list(chunk.sizes)} in {dtype}. The files belong to different checkpoints; copy "
                "the checkpoint again."
            )
        return chunk.start + tensor.start + skipped * DTYPE_BYTES[dtype]

    def _with_vocabulary(self, config: dict[str, Any]) -> dict[str, Any]:
        """Use the number of stored rows if no size is recorded; padding is unknown then."""
        embeddings = self._stored.get(VOCABULARY[0])
        if embeddings is None or not embeddings.info.shape:
            raise UpcyclingError(
                f"{self.directory} has no {VOCABULARY[0]}; expected a whole language model."
            )
        size = config.get("vocab_size")
        rows = embeddings.info.shape[0]
        return config | {"vocab_size": size if isinstance(size, int) and size > 0 else rows}


class _LazyPiece(Piece):
    """A piece whose offset in the file is determined on first use.

    A rank reads a small part of a checkpoint; locating all pieces would take thousands of reads.
    """

    _find: Callable[[], int]

    def __init__(self, file: str, rows: Span, columns: Span, find: Callable[[], int]) -> None:
        self.__dict__.update(file=file, rows=rows, columns=columns, _find=find)

    @cached_property
    def start(self) -> int:
        return self._find()


def _check_format(directory: Path) -> None:
    path = directory / "metadata.json"
    try:
        backend = json.loads(path.read_text())["sharded_backend"]
    except FileNotFoundError:
        backend = None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UpcyclingError(
            f"{path} cannot be read ({error!r}); expected JSON with a sharded_backend. "
            "The file is damaged; copy the checkpoint again."
        ) from error
    if backend != "torch_dist":
        problem = f"says sharded_backend={backend!r}" if backend else "is missing"
        raise UpcyclingError(
            f"{path} {problem}; expected Megatron-Core's format torch_dist. Load the checkpoint "
            "with the software that wrote the checkpoint and save it as torch_dist."
        )
    if not (directory / ".metadata").is_file():
        raise UpcyclingError(
            f"{directory} has no .metadata, which is written last: the checkpoint was not saved or "
            "copied completely. Copy the checkpoint again, with hidden files, or give an older one."
        )

"""Locations of the tensors of a torch_dist checkpoint, from `.metadata`.

The file is a pickle of `torch.distributed.checkpoint.metadata.Metadata`. Nothing in the file is
trusted: the parts of each tensor must cover it exactly once and be inside files of the directory.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_upcycle.checkpoint.dense import TensorInfo
from nemo_upcycle.checkpoint.dtypes import DTYPE_BYTES, dtype_called
from nemo_upcycle.checkpoint.unpickle import unpickle
from nemo_upcycle.errors import UpcyclingError, listing
from nemo_upcycle.families.names import stored_name

_PREFIX = re.compile(r"^(module\.|model\.)+")
_NO_WEIGHT = re.compile(r"^(chained_\d+\.)?optimizer\.|\._extra_state|^rng_state")
_EXPERTS = re.compile(r"\.mlp\.(experts|shared_experts|router)\.")
_STACKED = re.compile(r"^(decoder\.layers\.)(?!\d)")
_STACKED_EXPERTS = re.compile(r"(\.mlp\.experts\.)experts\.")


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor, saved by one rank.

    Attributes:
        file: Name of the file.
        start: Byte offset of the data that `torch.save` has written.
        length: Bytes of that data.
        offsets: Index of the first element in the whole tensor.
        sizes: Shape of the part.
    """

    file: str
    start: int
    length: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass
class StoredTensor:
    """A tensor of one layer (or of none), of one expert (or of none).

    Attributes:
        info: Shape and dtype.
        chunks: The parts, each with the index of this matrix in a stacked part (0 if not
            stacked).
    """

    info: TensorInfo
    chunks: list[tuple[Chunk, int]] = field(default_factory=list)


def read_metadata(directory: Path, experts: bool = False) -> dict[str, StoredTensor]:
    """Return the locations of the model's tensors, one per layer and expert.

    Args:
        directory: Directory of `.metadata`.
        experts: Whether an MoE is allowed.

    Returns:
        The model's tensors by Megatron's names with layers and experts filled in, without the
        optimizer's.

    Raises:
        UpcyclingError: `.metadata` is damaged or contradicts the files, or the checkpoint is an
            MoE that is not allowed.
    """
    path = directory / ".metadata"
    try:
        metadata = unpickle(path.read_bytes(), path)
    except OSError as error:
        raise UpcyclingError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        entries = _weights(metadata.state["state_dict_metadata"])
        places = _places(metadata.state["storage_data"])
        if not experts:
            _check_dense(directory, entries)
        tensors: dict[str, StoredTensor] = {}
        for key, entry in entries.items():
            chunks = _chunks(key, entry, places)
            for name, tensor in _unstacked(key, entry, chunks).items():
                if tensors.setdefault(name, tensor) is not tensor:
                    raise ValueError(f"{name} is there twice")
        _check_files(directory, tensors)
    except UpcyclingError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        why = error if type(error) is ValueError else repr(error)
        raise UpcyclingError(
            f"{path} does not describe a complete checkpoint: {why}. "
            "The checkpoint is damaged or incomplete; copy the checkpoint again."
        ) from error
    return tensors


def _weights(entries: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {
        key: entry.state
        for key, entry in entries.items()
        if entry.path.endswith(".TensorStorageMetadata") and not _NO_WEIGHT.search(key)
    }


def _check_dense(directory: Path, keys: Mapping[str, object]) -> None:
    experts = [key for key in keys if _EXPERTS.search(key)]
    if experts:
        raise UpcyclingError(
            f"{directory} is an MoE already: it has {listing(experts, 2)}. "
            "Give a dense checkpoint; to train this MoE further, resume from it, or begin a run "
            "with 'resume.restore_config=weights(path=DIR)'; for a larger one, "
            "`nemo-upcycle export` it, and `nemo-upcycle upcycle` the export."
        )


def _places(storage: Mapping[Any, Any]) -> dict[tuple[str, object], Mapping[str, Any]]:
    return {
        (key.state["fqn"], key.state.get("offset")): info.state for key, info in storage.items()
    }


def _chunks(
    key: str, entry: Mapping[str, Any], places: Mapping[tuple[str, object], Mapping[str, Any]]
) -> list[Chunk]:
    """Return the parts of a stored tensor, which cover the tensor exactly once."""
    size = _integers(entry["size"])
    chunks = []
    for chunk in entry["chunks"]:
        offsets, sizes = _integers(chunk.state["offsets"]), _integers(chunk.state["sizes"])
        if (key, offsets) not in places:
            raise ValueError(f"the part of {key} at {list(offsets)} is nowhere")
        chunks.append(_chunk(key, offsets, sizes, places[key, offsets]))
        ends = [offset + count for offset, count in zip(offsets, sizes, strict=True)]
        if 0 in sizes or any(end > n for end, n in zip(ends, size, strict=True)):
            raise ValueError(f"a part of {key} {list(size)} is {list(sizes)} at {list(offsets)}")
    _check_covered(key, size, chunks)
    return chunks


def _chunk(
    key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], place: Mapping[str, Any]
) -> Chunk:
    file = place["relative_path"]
    if not isinstance(file, str) or Path(file).name != file or file == "..":
        raise ValueError(f"{key} is said to be in {file!r}, which is no plain file name")
    if place.get("transform_descriptors"):
        raise ValueError(f"{key} is stored as {place['transform_descriptors']}, expected as it is")
    start, length = _integers((place["offset"], place["length"]))
    return Chunk(file, start, length, offsets, sizes)


def _integers(values: Sequence[Any]) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or any(type(n) is not int or n < 0 for n in values):
        raise ValueError(f"{values!r} is no shape")
    return tuple(values)


def _check_covered(key: str, size: tuple[int, ...], chunks: Sequence[Chunk]) -> None:
    """Check that the parts, all inside the tensor, have its total size and do not overlap."""
    covered = sum(math.prod(chunk.sizes) for chunk in chunks)
    if covered != math.prod(size):
        raise ValueError(f"the parts of {key} have {covered} elements of {math.prod(size)}")
    ordered = sorted(chunks, key=lambda chunk: chunk.offsets)
    for index, chunk in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if other.offsets[:1] >= tuple(n + chunk.sizes[0] for n in chunk.offsets[:1]):
                break
            if _overlap(chunk, other):
                raise ValueError(f"parts of {key} overlap at {list(other.offsets)}")


def _overlap(one: Chunk, other: Chunk) -> bool:
    places = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(a < b + size_b and b < a + size_a for a, size_a, b, size_b in places)


def _unstacked(
    key: str, entry: Mapping[str, Any], chunks: Sequence[Chunk]
) -> dict[str, StoredTensor]:
    """Present a stored tensor as one tensor per layer and expert, if stacked."""
    dtype = entry["properties"].state[0].path
    dtype = dtype_called(dtype) or dtype.removeprefix("torch.")
    # A separate norm module gets the name that Transformer Engine's fused norm has.
    key = _PREFIX.sub("", key).replace(
        ".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"
    )
    key = stored_name(key)
    stacked = [pattern for pattern in (_STACKED, _STACKED_EXPERTS) if pattern.search(key)]
    info = TensorInfo(tuple(entry["size"])[len(stacked) :], dtype)
    tensors: dict[str, StoredTensor] = {}
    for chunk in chunks:
        if math.prod(chunk.sizes) * DTYPE_BYTES.get(dtype, 1) > chunk.length:
            raise ValueError(f"{chunk.length} bytes of {key} are too few for {list(chunk.sizes)}")
        counts = chunk.sizes[: len(stacked)]
        for index, place in enumerate(itertools.product(*map(range, counts))):
            name = key
            for pattern, number, offset in zip(stacked, place, chunk.offsets, strict=False):
                name = pattern.sub(rf"\g<1>{offset + number}.", name)
            tensors.setdefault(name, StoredTensor(info)).chunks.append((chunk, index))
    return tensors


def check_files(weights: Path) -> None:
    """Check that all files of a checkpoint, also the optimizer's, have the length in `.metadata`.

    Args:
        weights: Directory of `.metadata`.

    Raises:
        UpcyclingError: A file is missing or shorter, or `.metadata` is damaged.
    """
    path = weights / ".metadata"
    try:
        places = [
            info.state for info in unpickle(path.read_bytes(), path).state["storage_data"].values()
        ]
        ends = [(place["relative_path"], place["offset"] + place["length"]) for place in places]
    except OSError as error:
        raise UpcyclingError(f"{path} cannot be read: {error.strerror}.") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise UpcyclingError(f"{path} is damaged: {error!r}.") from error
    _check_ends(weights, ends)


def _check_files(directory: Path, tensors: Mapping[str, StoredTensor]) -> None:
    chunks = [chunk for tensor in tensors.values() for chunk, _ in tensor.chunks]
    try:
        _check_ends(directory, [(chunk.file, chunk.start + chunk.length) for chunk in chunks])
    except UpcyclingError as error:
        raise UpcyclingError(f"{error} Copy the checkpoint again.") from error


def _check_ends(directory: Path, ends: Iterable[tuple[str, int]]) -> None:
    """Check that files exist and are long enough for their contents."""
    needed: dict[str, int] = {}
    for file, end in ends:
        needed[file] = max(needed.get(file, 0), end)
    missing = [file for file in needed if not (directory / file).is_file()]
    if missing:
        raise UpcyclingError(
            f"{directory} lacks {len(missing)} of the {len(needed)} files its .metadata names: "
            f"{listing(missing)}."
        )
    for file, end in needed.items():
        size = (directory / file).stat().st_size
        if size < end:
            raise UpcyclingError(
                f"{directory / file} has {size} bytes of the {end} that .metadata says."
            )

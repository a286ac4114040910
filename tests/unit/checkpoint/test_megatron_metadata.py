"""Damaged `.metadata`, and files that are not as it says."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
)

from nemo_upcycle.checkpoint import MegatronCheckpoint, open_checkpoint
from nemo_upcycle.checkpoint.megatron_metadata import check_files
from nemo_upcycle.errors import UpcyclingError
from tests.megatron_checkpoints import (
    FC1,
    LAYER,
    architecture,
    change_metadata,
    place,
    read,
    save,
    tensors,
)


def test_files_of_the_optimizer_are_checked_too(tmp_path: Path) -> None:
    state = tensors() | {"optimizer.state.exp_avg.x": torch.zeros(100_000)}
    directory = save(tmp_path / "saved", state)
    check_files(directory)
    for file in directory.glob("*.distcp"):
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UpcyclingError, match=r"distcp has \d+ bytes of the \d+ that .metadata"):
        check_files(directory)
    (directory / ".metadata").write_bytes(b"")
    with pytest.raises(UpcyclingError, match="metadata"):
        check_files(directory)


def _outside(path: str) -> Callable[[Path], None]:
    def change(metadata: Metadata) -> None:
        place(metadata).relative_path = path

    return lambda d: change_metadata(d, change)


def _lose_chunk(metadata: Metadata) -> None:
    metadata.state_dict_metadata[FC1].chunks.pop()


def _lose_place(metadata: Metadata) -> None:
    del metadata.storage_data[next(i for i in metadata.storage_data if i.fqn == FC1)]


def _overlap(metadata: Metadata) -> None:
    entry = metadata.state_dict_metadata[FC1]
    entry.chunks[1] = entry.chunks[0]


def _too_large(metadata: Metadata) -> None:
    entry = metadata.state_dict_metadata[FC1]
    entry.size = torch.Size([10**9, *entry.size[1:]])
    entry.chunks = [ChunkStorageMetadata(torch.Size([0, 0, 0]), entry.size)]


def _other_place(metadata: Metadata) -> None:
    other = place(metadata, LAYER + "mlp.linear_fc2.weight")
    place(metadata).offset, place(metadata).length = other.offset, other.length


def _wrong_dtype(metadata: Metadata) -> None:
    metadata.state_dict_metadata[FC1].properties.dtype = torch.bfloat16


def _transformed(metadata: Metadata) -> None:
    place(metadata).transform_descriptors = ["zstd"]


def _truncate(name: str, by: int) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[:-by])

    return change


def _garbage(name: str) -> Callable[[Path], None]:
    return lambda d: (d / name).write_bytes(b"\x00garbage" * 50) and None


def _zeros_in_file(directory: Path) -> None:
    path = directory / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no .metadata": (lambda d: (d / ".metadata").unlink(), "has no .metadata"),
    "empty .metadata": (lambda d: (d / ".metadata").write_bytes(b""), "cannot be read"),
    ".metadata is garbage": (_garbage(".metadata"), "cannot be read"),
    ".metadata is another object": (
        lambda d: (d / ".metadata").write_bytes(pickle.dumps([1, 2])),
        "does not describe a complete checkpoint",
    ),
    ".metadata ends early": (_truncate(".metadata", 40), "cannot be read"),
    "a file is missing": (lambda d: (d / "__1_0.distcp").unlink(), "lacks 1 of the 2 files"),
    "a file ends early": (_truncate("__1_0.distcp", 400), "of the .* that .metadata says"),
    "a file is zeros": (_zeros_in_file, "cannot be read as a file of torch.save"),
    "a chunk is missing": (
        lambda d: change_metadata(d, _lose_chunk),
        f"the parts of {FC1} have 192 elements of 384",
    ),
    "a chunk has no place": (lambda d: change_metadata(d, _lose_place), "is nowhere"),
    "chunks overlap": (lambda d: change_metadata(d, _overlap), "overlap at"),
    "a chunk is larger than its file": (lambda d: change_metadata(d, _too_large), "too few for"),
    "a chunk is another's": (
        lambda d: change_metadata(d, _other_place),
        "belong to different checkpoints",
    ),
    "the dtype is another": (lambda d: change_metadata(d, _wrong_dtype), "holds .* in F32"),
    "a chunk is compressed": (lambda d: change_metadata(d, _transformed), "zstd"),
    "a path goes up": (_outside("../__0_0.distcp"), "no plain file name"),
    "a path is absolute": (_outside("/etc/passwd"), "no plain file name"),
    "a path is the parent": (_outside(".."), "no plain file name"),
    "zarr": (
        lambda d: (d / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "sharded_backend='zarr'; expected .* torch_dist",
    ),
    "no metadata.json": (lambda d: (d / "metadata.json").unlink(), "is missing; expected"),
    "metadata.json is a list": (lambda d: (d / "metadata.json").write_text("[]"), "cannot be read"),
    "legacy": (lambda d: (d / "mp_rank_00").mkdir(), "legacy format"),
    "common.pt is garbage": (_garbage("common.pt"), "cannot be read as a file of torch.save"),
    "no common.pt": (lambda d: (d / "common.pt").unlink(), "does not describe the model"),
    "no args": (lambda d: torch.save({}, d / "common.pt"), "no args in common.pt"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(tmp_path: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    directory = save(tmp_path / "saved", tensors())
    damage(directory)
    with pytest.raises(UpcyclingError, match=message):
        architecture(directory)
        checkpoint = MegatronCheckpoint(directory)
        for name in checkpoint.tensors:
            read(checkpoint, name)


def test_a_compressed_chunk_is_refused(tmp_path: Path) -> None:
    """Compressed bytes cannot be read in place, and a small file could grow without bound."""
    directory = save(tmp_path / "saved", tensors())
    common = directory / "common.pt"
    with zipfile.ZipFile(common) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(common, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in entries.items():
            new.writestr(name, data)
    with pytest.raises(UpcyclingError, match="is compressed"):
        open_checkpoint(str(directory))

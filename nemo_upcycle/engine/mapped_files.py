"""Shards whose memory is a file: what is written to the shards is written to a safetensors file."""

import errno
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch

from nemo_upcycle.checkpoint.dtypes import torch_dtype
from nemo_upcycle.engine.owned_shards import OwnedShard
from nemo_upcycle.plans.rank import Shard
from nemo_upcycle.trained.outputs import Output, OutputFile

RELEASE_BYTES = 8 * 2**20
"""Bytes of the dense checkpoint after which written pages are handed back to the kernel's cache.

Each byte is written as many times as there are copies of the layer."""


class MappedFiles:
    """Safetensors files of their final size, mapped into memory.

    Attributes:
        owned: The shards that the tensors are made of, as views of the files.
        doubled: Tensors that are to be twice Megatron's values.
    """

    def __init__(
        self, files: Iterable[OutputFile], shapes: Mapping[str, tuple[int, ...]], directory: Path
    ) -> None:
        self.owned: list[OwnedShard] = []
        self.doubled: list[torch.Tensor] = []
        self._maps: list[mmap.mmap] = []
        self._released = 0
        for file in files:
            memory = _mapped(file, directory / file.name)
            self._maps.append(memory)
            for output, values in _tensors(file, memory):
                self.owned.extend(_shards(output, values, shapes))
                if output.doubled:
                    self.doubled.append(values)

    def release(self, done: int) -> None:
        """Hand pages back where enough was written since the last time.

        Args:
            done: Bytes done so far. What is in the pages stays in the file.
        """
        if done - self._released >= RELEASE_BYTES:
            self._released = done
            for memory in self._maps:
                memory.madvise(mmap.MADV_DONTNEED)

    def flush(self) -> None:
        """Wait until the disk has everything.

        Raises:
            OSError: The disk has failed.
        """
        for memory in self._maps:
            memory.flush()


@contextmanager
def mapped_files(
    files: Iterable[OutputFile], shapes: Mapping[str, tuple[int, ...]], directory: Path
) -> Iterator[MappedFiles]:
    """Make safetensors files whose tensors are filled in place.

    Args:
        files: The files to make, with their tensors.
        shapes: Shapes of the whole parameters that the tensors are made of, by name.
        directory: Where the files are made.

    Raises:
        OSError: There is no room for them on the disk; or, at the end, the disk has failed.
    """
    mapped = MappedFiles(files, shapes, directory)
    yield mapped
    mapped.flush()


def _mapped(file: OutputFile, path: Path) -> mmap.mmap:
    """Make a file of its final size with its header, and map it."""
    size = len(file.head) + sum(output.bytes for output in file.outputs.values())
    with path.open("xb+") as opened:
        _reserve(opened.fileno(), size)
        opened.write(file.head)
        opened.flush()
        return mmap.mmap(opened.fileno(), size)


def _reserve(descriptor: int, size: int) -> None:
    """Reserve a file's space: a write to mapped memory without space would end the process."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:  # macOS, and file systems that cannot
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)


def _tensors(file: OutputFile, memory: mmap.mmap) -> Iterator[tuple[Output, torch.Tensor]]:
    """Yield the tensors of a file with views of their memory."""
    position = len(file.head)
    for output in file.outputs.values():
        if not output.bytes:  # a shared expert of no neurons
            continue
        dtype, shape = torch_dtype(output.info.dtype), output.info.shape
        values = torch.frombuffer(memory, dtype=dtype, count=prod(shape), offset=position)
        yield output, values.view(shape)
        position += output.bytes


def _shards(
    output: Output, values: torch.Tensor, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[OwnedShard]:
    for start, part in output.parts.items():
        shape = shapes[part.name]
        rest = shape[1:]
        shard = Shard(part.name, shape, (part.start, *[0] * len(rest)), (part.count, *rest))
        yield OwnedShard(shard, values[start : start + part.count])

"""Read blocks of a dense checkpoint in chunks and write the chunks to their targets.

A few threads each read a chunk into a separate buffer and write the chunk from there, so that one
thread waits for the disk while another writes. If ranks share a block (`sharing.py`), one rank
reads and the others receive. Broadcasts need an order, so shared blocks are processed in turn.
"""

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nemo_upcycle.checkpoint import DenseCheckpoint, Span
from nemo_upcycle.checkpoint.dtypes import torch_dtype
from nemo_upcycle.engine.sharing import Sharers
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.plans.rank import BUFFERS, Block, block_bytes, chunks

# Bits of +Inf: as signed integers, all finite values are smaller.
_INFINITY: dict[str, "np.signedinteger[Any]"] = {
    "F64": np.int64(0x7FF0_0000_0000_0000),
    "F32": np.int32(0x7F80_0000),
    "F16": np.int16(0x7C00),
    "BF16": np.int16(0x7F80),
}


@dataclass(frozen=True)
class Chunk:
    """A run of rows of a block; see `plans.rank.chunks`."""

    block: Block
    rows: Span

    @property
    def first(self) -> int:
        """The first row, counted from the start of the block."""
        return self.rows[0] - self.block.rows[0]


Write = Callable[[Chunk, torch.Tensor], None]


class _Buffer:
    """Memory for one chunk at a time."""

    def __init__(self, size: int, device: torch.device) -> None:
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.raw = memoryview(memory.numpy())
        self._device = device
        self._copied: torch.cuda.Event | None = None

    def on_device(self, values: torch.Tensor) -> torch.Tensor:
        """Copy the values to the device asynchronously, unless the device is the CPU."""
        if self._device.type != "cuda":
            return values
        with torch.cuda.device(self._device):  # the current device is per thread
            moved = values.to(self._device, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        return moved

    def wait(self) -> None:
        """Wait until the memory may be overwritten."""
        if self._copied is not None:
            self._copied.synchronize()


def copy_blocks(
    checkpoint: DenseCheckpoint,
    blocks: Sequence[Block],
    device: torch.device,
    shared: Mapping[Block, Sharers],
    write: Write,
) -> Iterator[Chunk]:
    """Read blocks chunk by chunk and write each chunk to its targets.

    Args:
        checkpoint: The dense checkpoint.
        blocks: Blocks to read, in this order; shared blocks have the same order on all ranks.
        device: Device of the parameters.
        shared: Blocks that other ranks need too, with the rank that reads.
        write: Called with a chunk and its values, [rows, columns] or [rows], in the checkpoint's
            dtype, on `device`; by several threads at a time. The values are valid only during
            the call.

    Yields:
        Each chunk after it is written.

    Raises:
        UpcyclingError: The checkpoint cannot be read, or holds NaN or Inf.
    """
    todo = [Chunk(block, rows) for block in blocks for rows in chunks(block, checkpoint.tensors)]
    largest = max((chunk_bytes(chunk, checkpoint) for chunk in todo), default=0)
    cores = thread_count()
    count = min(BUFFERS if shared else cores, len(todo))
    free = deque(_Buffer(largest, device) for _ in range(count))

    def read(chunk: Chunk, buffer: _Buffer) -> torch.Tensor:
        buffer.wait()
        values = _values(checkpoint, chunk, buffer.raw)
        sharers = shared.get(chunk.block)
        if sharers is None or sharers.this_rank_reads:
            _read(checkpoint, chunk, buffer.raw, values)
        if sharers is None:
            write(chunk, buffer.on_device(values))
        return values

    error: UpcyclingError | None = None
    running: deque[tuple[Chunk, _Buffer, Future[torch.Tensor]]] = deque()
    threads = ThreadPoolExecutor(cores) if cores > 1 else _ThisThread()
    with threads:
        waiting = iter(todo)
        while True:
            for chunk in itertools.islice(waiting, len(free)):
                buffer = free.popleft()
                running.append((chunk, buffer, threads.submit(read, chunk, buffer)))
            if not running:
                break
            chunk, buffer, future = running.popleft()
            try:
                values = future.result()
            except UpcyclingError as failed:
                if not shared:
                    threads.shutdown(cancel_futures=True)
                    raise
                # The other ranks wait for this block; they learn of the error at the end.
                error = error or failed
                values = _values(checkpoint, chunk, buffer.raw)
            if chunk.block in shared:
                _broadcast(chunk, buffer.on_device(values), shared[chunk.block], write)
            yield chunk
            free.append(buffer)
    if error is not None:
        raise error


class _ThisThread(Executor):
    """Runs work immediately: handing a small read to a thread takes longer than the read."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except UpcyclingError as error:
            future.set_exception(error)
        return future


def _broadcast(chunk: Chunk, values: torch.Tensor, sharers: Sharers, write: Write) -> None:
    torch.distributed.broadcast(values, sharers.reader, group=sharers.group)
    write(chunk, values)


def thread_count() -> int:
    """Return the number of reading threads: this rank's share of the cores, at least one.

    More threads than cores would compete for the cache. With a single thread, the kernel reads
    ahead while the thread writes.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(BUFFERS, (os.cpu_count() or 1) // ranks))


def _read(checkpoint: DenseCheckpoint, chunk: Chunk, raw: memoryview, values: torch.Tensor) -> None:
    """Read a chunk into a buffer, of which `values` is a view."""
    block = chunk.block
    raw = raw[: chunk_bytes(chunk, checkpoint)]
    checkpoint.read_into(raw, block.tensor, chunk.rows, block.columns)
    # Fast test: a sum with NaN or Inf is never finite, although finite values may overflow too.
    if not math.isfinite(float(values.sum())) and not all_finite(
        np.frombuffer(raw, np.uint8), checkpoint.tensors[block.tensor].dtype
    ):
        raise UpcyclingError(
            f"Tensor {block.tensor} of {checkpoint.directory} holds NaN or Inf in rows "
            f"{chunk.rows[0]}:{chunk.rows[1]}; expected finite weights. "
            "The checkpoint is damaged; get the checkpoint again."
        )


def all_finite(raw: "np.ndarray[tuple[int], np.dtype[np.uint8]]", dtype: str) -> bool:
    """Return whether bytes hold neither NaN nor Inf.

    In NaN and Inf all bits of the exponent are set. As integers they are the largest of the
    positive numbers (read as signed) and of the negative numbers (read as unsigned). Two integer
    maxima are several times faster than `isfinite`.

    Args:
        raw: The bytes of the values.
        dtype: safetensors' name of the dtype.
    """
    infinity = _INFINITY[dtype]
    signed = raw.view(infinity.dtype)
    unsigned = raw.view(f"u{infinity.dtype}")
    sign_bit = 1 << (infinity.nbytes * 8 - 1)
    return bool(signed.max() < infinity and unsigned.max() < int(infinity) + sign_bit)


def _values(checkpoint: DenseCheckpoint, chunk: Chunk, raw: memoryview) -> torch.Tensor:
    """Return the buffer as the chunk's values."""
    info = checkpoint.tensors[chunk.block.tensor]
    shape = [chunk.rows[1] - chunk.rows[0]]
    if len(info.shape) > 1:
        first, last = chunk.block.columns or (0, info.width)
        shape.append(last - first)
    dtype = torch_dtype(info.dtype)
    return torch.frombuffer(raw, dtype=dtype, count=math.prod(shape)).view(shape)


def chunk_bytes(chunk: Chunk, checkpoint: DenseCheckpoint) -> int:
    """Return the size of a chunk in the checkpoint's dtype."""
    rows = Block(chunk.block.tensor, chunk.rows, chunk.block.columns)
    return block_bytes(rows, checkpoint.tensors)

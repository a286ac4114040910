"""Parts of the dense feed-forward layers, for initializers that need more than an expert's copy."""

from collections import OrderedDict
from threading import Lock

import numpy as np
import numpy.typing as npt
import torch

from nemo_upcycle.checkpoint import DenseCheckpoint, Span
from nemo_upcycle.checkpoint.branches import branch_name
from nemo_upcycle.checkpoint.dtypes import torch_dtype
from nemo_upcycle.families import Rows

BLOCK_BYTES = 2**20
"""Maximum size of a block of neurons: bytes of gate, of up and of down, in fp32."""

_HELD = 3
"""Parts in memory: gate, up and down of a layer."""


class DenseParts:
    """The parts of the dense layers, each read on first use.

    Args:
        checkpoint: The dense checkpoint.

    Attributes:
        bytes_read: Bytes read so far.
    """

    def __init__(self, checkpoint: DenseCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._statistics: dict[Rows, tuple[float, float]] = {}
        self._held: OrderedDict[Rows, torch.Tensor] = OrderedDict()
        self._lock = Lock()
        self.bytes_read = 0

    def statistics(self, layer: int, copy: int, part: str) -> tuple[float, float]:
        """Return mean and standard deviation of a part.

        Always computed over the whole part in the same order, so that all ranks of all mappings
        agree.
        """
        rows = self._rows(layer, copy, part)
        with self._lock:
            if rows not in self._statistics:
                self._statistics[rows] = self._read_statistics(rows)
            return self._statistics[rows]

    def neurons(
        self, layer: int, copy: int, part: str, ids: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Return some neurons of a part in fp32, [neurons, hidden]."""
        rows = self._rows(layer, copy, part)
        with self._lock:
            if rows not in self._held:
                while len(self._held) >= _HELD:
                    self._held.popitem(last=False)
                start, stop = rows.span(self._checkpoint.tensors[rows.tensor].shape[0])
                self._held[rows] = self._read(rows, (start, stop))
            values = self._held[rows]
        chosen = torch.from_numpy(ids)
        found = values[:, chosen].T if part == "down" else values[chosen]
        return np.ascontiguousarray(found.float().numpy())

    def _rows(self, layer: int, copy: int, part: str) -> Rows:
        dense = self._checkpoint
        rows = dense.family.feed_forward(dense.architecture, layer)[part]
        branches = len(dense.branches)
        if branches > 1:
            rows = Rows(branch_name(copy % branches, rows.tensor), rows.start, rows.stop)
        return rows

    def _read(self, rows: Rows, span: Span) -> torch.Tensor:
        """Read rows of a tensor, in the stored dtype."""
        info = self._checkpoint.tensors[rows.tensor]
        buffer = torch.empty((span[1] - span[0], info.width), dtype=torch_dtype(info.dtype))
        raw = memoryview(buffer.view(-1).view(torch.uint8).numpy())
        self._checkpoint.read_into(raw, rows.tensor, span, None)
        self.bytes_read += info.stored(len(raw))
        return buffer

    def _read_statistics(self, rows: Rows) -> tuple[float, float]:
        info = self._checkpoint.tensors[rows.tensor]
        start, stop = rows.span(info.shape[0])
        step = max(1, BLOCK_BYTES // (4 * info.width))
        sums, squares = [], []
        for first in range(start, stop, step):
            values = self._read(rows, (first, min(first + step, stop))).double().numpy()
            sums.append(values.sum(axis=1))
            squares.append(np.square(values).sum(axis=1))
        count = (stop - start) * info.width
        mean = float(np.concatenate(sums).sum()) / count
        variance = float(np.concatenate(squares).sum()) / count - mean**2
        return mean, max(0.0, variance) ** 0.5

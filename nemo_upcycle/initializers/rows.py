"""The rows of a router, which a router initializer returns."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nemo_upcycle.initializers.random import ROUTER, normal_row

Values = npt.NDArray[np.floating]


@dataclass(frozen=True)
class RouterRows:
    """The rows that a layer's router needs; never a part of them.

    A row is that of an expert. Where experts are shards of copies of the dense layer, a row is that
    of a copy, for all initializers but `random`: all shards of a copy get the row, so that top-k
    picks whole copies.

    Attributes:
        layer: Global layer, from 0.
        count: Number of rows.
        hidden_size: Number of columns.
        std: Standard deviation of random rows.
        seed: Seed of all draws.
    """

    layer: int
    count: int
    hidden_size: int
    std: float
    seed: int

    @property
    def norm(self) -> float:
        """The expected length of a random row, √hidden · std, up to rounding."""
        return math.sqrt(self.hidden_size) * self.std

    def normal(self) -> npt.NDArray[np.float64]:
        """Draw standard normal values, [rows, hidden]."""
        rows = range(self.count)
        return np.stack(
            [normal_row(self.seed, ROUTER, self.layer, row, 0, self.hidden_size) for row in rows]
        )

"""Random values that do not depend on the parallel mapping.

Philox is a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011). Every (seed, stream, layer, expert, row) has a separate counter range. Any rank can
therefore draw any row without drawing the others, and all ranks get the same values for a row.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

ROUTER, CLUSTERS, SAMPLE = 1, 11, 12
"""Streams keep the draws of different purposes apart; 2 to 8 are those of `Neurons`."""


def generator(seed: int, stream: int, layer: int, expert: int, row: int) -> np.random.Generator:
    """Return the generator of one row.

    Args:
        seed: Seed of the whole model.
        stream: Purpose of the draw, such as `ROUTER`.
        layer: Global layer, from 0.
        expert: Global expert, from 0.
        row: Row of the expert (its neuron), from 0.
    """
    return next(generators(seed, stream, layer, expert, [row]))


def generators(
    seed: int, stream: int, layer: int, expert: int, rows: Iterable[int]
) -> Iterator[np.random.Generator]:
    """Yield the generator of each row; see `generator`.

    It is one object, set to each row in turn: a new generator would take four times longer.
    """
    philox = np.random.Philox(key=[seed, stream])
    source, start = np.random.Generator(philox), philox.state
    for row in rows:
        start["state"]["counter"][:] = 0, row, expert, layer
        philox.state = start
        yield source


def normal_row(
    seed: int, stream: int, layer: int, expert: int, row: int, size: int
) -> npt.NDArray[np.float64]:
    """Draw `size` standard normal values for one row; see `generator`."""
    return generator(seed, stream, layer, expert, row).standard_normal(size)

"""Random values that do not depend on the parallel mapping.

Philox is a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011). Every (seed, stream, layer, expert, row) has a separate counter range. Any rank can
therefore draw any row without drawing the others, and all ranks get the same values for a row.
"""

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
    return np.random.Generator(
        np.random.Philox(key=[seed, stream], counter=[0, row, expert, layer])
    )


def normal_row(
    seed: int, stream: int, layer: int, expert: int, row: int, size: int
) -> npt.NDArray[np.float64]:
    """Draw `size` standard normal values for one row; see `generator`."""
    return generator(seed, stream, layer, expert, row).standard_normal(size)

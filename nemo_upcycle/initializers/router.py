"""Router initialisers."""

import numpy as np
import numpy.typing as npt

from nemo_upcycle.initializers.random import ROUTER, normal_row


def random_router(
    seed: int, layer: int, experts: tuple[int, int], hidden_size: int, std: float
) -> npt.NDArray[np.float32]:
    """Draw the router rows of some experts of one layer.

    Args:
        seed: Seed of the whole model.
        layer: Global layer, from 0.
        experts: Start and stop of the global experts.
        hidden_size: Columns.
        std: Standard deviation.

    Returns:
        [experts, hidden_size], the same values on any parallel mapping.

    Source: random routers, arXiv 2412.09952 §3.
    """
    rows = [normal_row(seed, ROUTER, layer, expert, 0, hidden_size) for expert in range(*experts)]
    return (np.stack(rows) * std).astype(np.float32)

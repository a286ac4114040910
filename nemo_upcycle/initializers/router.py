"""Router initialisers."""

import numpy as np
import numpy.typing as npt

from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.initializers.random import ROUTER, normal_row


def initialize_router(
    upcycling: UpcyclingConfig, layer: int, experts: tuple[int, int], hidden_size: int
) -> npt.NDArray[np.float32]:
    """Draw the router rows of some experts of one layer.

    Args:
        upcycling: Gives the initialiser, the standard deviation and the seed.
        layer: Global layer, from 0.
        experts: Start and stop of the global experts.
        hidden_size: Number of columns.

    Returns:
        [experts, hidden_size], the same values under any parallel mapping. With `virtual_groups`
        the experts that make up one copy of the layer have equal rows.

    Source: random routers, arXiv 2412.09952 §3; virtual groups, arXiv 2410.07524 §3.
    """
    prototypes = list(range(*experts))
    if upcycling.router_initializer == "virtual_groups":
        prototypes = [upcycling.copy_of(expert) for expert in prototypes]
    rows = [normal_row(upcycling.seed, ROUTER, layer, row, 0, hidden_size) for row in prototypes]
    return (np.stack(rows) * upcycling.router_init_std).astype(np.float32)

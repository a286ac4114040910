"""The router rows of some experts, by the initializer that the config names."""

import numpy as np
import numpy.typing as npt

from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.initializers.registry import make_router_initializer
from nemo_upcycle.initializers.rows import RouterRows


def initialize_router(
    upcycling: UpcyclingConfig, layer: int, experts: tuple[int, int], hidden_size: int
) -> npt.NDArray[np.float32]:
    """Return the router rows of some experts of one layer.

    Args:
        upcycling: Gives the initializer, the standard deviation and the seed.
        layer: Global layer, from 0.
        experts: Start and stop of the global experts.
        hidden_size: Number of columns.

    Returns:
        [experts, hidden_size], the same values under any parallel mapping; see `RouterRows`.

    Raises:
        UpcyclingError: There is no such initializer, or the initializer returns no such rows.
    """
    rows = RouterRows(
        layer=layer,
        count=upcycling.router_rows,
        hidden_size=hidden_size,
        std=upcycling.router_init_std,
        seed=upcycling.seed,
    )
    values = np.asarray(make_router_initializer(upcycling.router_initializer)(rows))
    if values.shape != (rows.count, hidden_size) or not np.isfinite(values).all():
        raise UpcyclingError(
            f"router_initializer {upcycling.router_initializer!r} gives values of shape "
            f"{list(values.shape)}; expected {[rows.count, hidden_size]}, all of them finite."
        )
    own = [upcycling.router_row(expert) for expert in range(*experts)]
    return values[own].astype(np.float32)

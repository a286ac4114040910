"""What routers start from."""

import numpy as np

from nemo_upcycle.config import LARGEST_SEED, UpcyclingConfig
from nemo_upcycle.initializers import initialize_router


def test_seeds_up_to_the_largest_are_different_ones() -> None:
    seeds = (0, 2**53, 2**53 + 1, LARGEST_SEED - 1, LARGEST_SEED)
    drawn = {initialize_router(UpcyclingConfig(seed=s), 0, (0, 1), 4).tobytes() for s in seeds}
    assert len(drawn) == len(seeds)


def test_virtual_groups_have_equal_rows() -> None:
    upcycling = UpcyclingConfig(num_moe_experts=12, granularity=3, moe_router_topk=3)
    rows = initialize_router(upcycling, 0, (0, 12), 64)
    groups = rows.reshape(4, 3, 64)
    assert (groups == groups[:, :1]).all()
    assert len({group.tobytes() for group in groups[:, 0]}) == 4
    assert np.array_equal(initialize_router(upcycling, 0, (5, 8), 64), rows[5:8])
    each = UpcyclingConfig(
        num_moe_experts=12, granularity=3, moe_router_topk=3, router_initializer="random"
    )
    assert len({row.tobytes() for row in initialize_router(each, 0, (0, 12), 64)}) == 12

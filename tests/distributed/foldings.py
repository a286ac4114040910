"""The mappings that every test of exactness runs over, as data."""

from dataclasses import dataclass
from typing import Any

import pytest

from nemo_upcycle.config import ParallelFolding

DENSE: dict[str, dict[str, Any]] = {
    "4 layers": {},
    "6 layers": {"num_hidden_layers": 6},
    "8 layers": {"num_hidden_layers": 8},
    "tied": {"tie_word_embeddings": True},
}
"""Dense models by name: what is asked of `write_llama`."""


@dataclass(frozen=True)
class Spread:
    """A mapping on as many ranks, for one of the dense models."""

    world_size: int
    folding: ParallelFolding
    dense: str = "4 layers"


def spread(world_size: int, dense: str = "4 layers", **sizes: Any) -> Spread:
    """Name a mapping shortly. DP and expert-DP are what is left of the ranks."""
    return Spread(world_size, ParallelFolding.of(**sizes), dense)


FIRST1 = {"num_layers_in_first_pipeline_stage": 1}
LAST1 = {"num_layers_in_last_pipeline_stage": 1}
ENDS_COUNT = {
    "account_for_embedding_in_pipeline_split": True,
    "account_for_loss_in_pipeline_split": True,
}

FOLDINGS = {
    "DP2": spread(2),
    "EP2": spread(2, ep=2),
    "ETP2": spread(2, etp=2),
    "TP2-ETP1": spread(2, tp=2),
    "TP2-ETP2": spread(2, tp=2, etp=2),
    "TP2-EP2-ETP1": spread(2, tp=2, ep=2),
    "TP2-tied": spread(2, tp=2, dense="tied"),
    "CP2": spread(2, cp=2),
    "CP2-EP2": spread(2, cp=2, ep=2),
    "CP2-ETP2": spread(2, cp=2, etp=2),
    "PP2": spread(2, pp=2),
    "PP2-first1": spread(2, pp=2, **FIRST1),
    "PP2-last1": spread(2, pp=2, **LAST1),
    "PP2-tied": spread(2, pp=2, dense="tied"),
    "PP2-VPP2": spread(2, pp=2, vpp=2),
    "PP2-VPP2-ends": spread(2, pp=2, vpp=2, dense="6 layers", **ENDS_COUNT),
    "DP4": spread(4),
    "EP4": spread(4, ep=4),
    "EP2-EDP2": spread(4, ep=2),
    "ETP4": spread(4, etp=4),
    "ETP2-EDP2": spread(4, etp=2),
    "EP2-ETP2": spread(4, ep=2, etp=2),
    "TP4-ETP1": spread(4, tp=4),
    "TP4-ETP4": spread(4, tp=4, etp=4),
    "TP4-EP2-ETP2": spread(4, tp=4, ep=2, etp=2),
    "TP4-EP4-ETP1": spread(4, tp=4, ep=4),
    "TP2-DP2-EP2-ETP1": spread(4, tp=2, ep=2),
    "TP2-DP2-EP2-ETP2": spread(4, tp=2, ep=2, etp=2),
    "TP2-DP2-EP4-ETP1": spread(4, tp=2, ep=4),
    "TP2-DP2-ETP4": spread(4, tp=2, etp=4),
    "CP4": spread(4, cp=4),
    "CP2-DP2-EP2": spread(4, cp=2, ep=2),
    "TP2-CP2-ETP1": spread(4, tp=2, cp=2),
    "TP2-CP2-ETP2": spread(4, tp=2, cp=2, etp=2),
    "TP2-CP2-EP4-ETP1": spread(4, tp=2, cp=2, ep=4),
    "PP4": spread(4, pp=4),
    "PP4-first1-last1": spread(4, pp=4, dense="6 layers", **FIRST1, **LAST1),
    "PP4-ends": spread(4, pp=4, dense="6 layers", **ENDS_COUNT),
    "PP4-VPP2": spread(4, pp=4, vpp=2, dense="8 layers"),
    "PP2-DP2": spread(4, pp=2),
    "PP2-ETP2": spread(4, pp=2, etp=2),
    "PP2-EP2-first1": spread(4, pp=2, ep=2, **FIRST1),
    "PP2-CP2-EP2": spread(4, pp=2, cp=2, ep=2),
    "PP2-TP2-ETP2-tied": spread(4, pp=2, tp=2, etp=2, dense="tied"),
    "PP2-TP2-EP2-ETP1": spread(4, pp=2, tp=2, ep=2),
    "PP2-VPP2-EP2": spread(4, pp=2, vpp=2, ep=2),
    "PP2-VPP2-CP2": spread(4, pp=2, vpp=2, cp=2),
    "PP2-VPP2-TP2-ETP1": spread(4, pp=2, vpp=2, tp=2),
    "PP2-VPP2-TP2-EP2-ETP1": spread(4, pp=2, vpp=2, tp=2, ep=2),
}
"""Names leave out what is 1, except expert-TP where TP is more."""

ONE_RANK = {f"1 rank, {dense}": spread(1, dense=dense) for dense in DENSE}

OF_EVERY_PAIR = {
    *("DP2", "EP2", "TP2-ETP1", "TP2-tied", "CP2-ETP2"),
    *("PP2-last1", "PP2-tied", "PP2-VPP2-ends"),
    *("DP4", "EP2-EDP2", "ETP2-EDP2", "TP4-EP2-ETP2"),
    *("TP2-DP2-EP2-ETP1", "TP2-DP2-EP4-ETP1", "TP2-DP2-ETP4", "CP2-DP2-EP2", "TP2-CP2-EP4-ETP1"),
    *("PP4-first1-last1", "PP4-VPP2", "PP2-EP2-first1", "PP2-TP2-ETP2-tied", "PP2-VPP2-CP2"),
    "PP2-VPP2-TP2-EP2-ETP1",
}
"""Mappings in which each kind of parallelism meets each other; all else are slow tests."""

OF_EVERY_KIND = {
    *("EP2", "TP2-tied", "CP2-ETP2", "PP2-VPP2-ends", "EP2-EDP2", "TP4-EP2-ETP2"),
    *("TP2-DP2-EP2-ETP1", "PP2-TP2-ETP2-tied", "PP2-VPP2-TP2-EP2-ETP1"),
}
"""Mappings that `make test` runs: each kind of parallelism is in one at least."""


def marks(name: str) -> tuple[pytest.MarkDecorator, ...]:
    """Return the marks of a mapping's case of a test that runs over all mappings."""
    if name in OF_EVERY_KIND | ONE_RANK.keys():
        return ()
    return (pytest.mark.thorough if name in OF_EVERY_PAIR else pytest.mark.slow,)


NAMES = [pytest.param(name, marks=marks(name)) for name in FOLDINGS]
"""All mappings, to parametrize a test with."""

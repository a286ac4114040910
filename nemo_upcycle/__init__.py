"""Upcycle dense LLM checkpoints into Mixture-of-Experts models, online, as the model loads.

The names below are the public API. They are imported when first used, and none of them imports
NeMo: that is what `nemo_upcycle.nemo` does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_upcycle.checkpoint.described import open_dense
    from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
    from nemo_upcycle.engine.upcycled_directory import upcycle_directory
    from nemo_upcycle.engine.upcycling import upcycle
    from nemo_upcycle.errors import UpcyclingError
    from nemo_upcycle.initializers import register as register_initializer
    from nemo_upcycle.initializers import register_router as register_router_initializer
    from nemo_upcycle.plans.job import plan_job as plan
    from nemo_upcycle.trained.export import export
    from nemo_upcycle.trained.grown_directory import grow_directory
    from nemo_upcycle.trained.growth import Growth

__version__ = "0.1.0"

_PLACES = {
    "Growth": ("nemo_upcycle.trained.growth", "Growth"),
    "ParallelFolding": ("nemo_upcycle.config", "ParallelFolding"),
    "UpcyclingConfig": ("nemo_upcycle.config", "UpcyclingConfig"),
    "UpcyclingError": ("nemo_upcycle.errors", "UpcyclingError"),
    "export": ("nemo_upcycle.trained.export", "export"),
    "grow_directory": ("nemo_upcycle.trained.grown_directory", "grow_directory"),
    "open_dense": ("nemo_upcycle.checkpoint.described", "open_dense"),
    "plan": ("nemo_upcycle.plans.job", "plan_job"),
    "register_initializer": ("nemo_upcycle.initializers", "register"),
    "register_router_initializer": ("nemo_upcycle.initializers", "register_router"),
    "upcycle": ("nemo_upcycle.engine.upcycling", "upcycle"),
    "upcycle_directory": ("nemo_upcycle.engine.upcycled_directory", "upcycle_directory"),
}

__all__ = [
    "Growth",
    "ParallelFolding",
    "UpcyclingConfig",
    "UpcyclingError",
    "export",
    "grow_directory",
    "open_dense",
    "plan",
    "register_initializer",
    "register_router_initializer",
    "upcycle",
    "upcycle_directory",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

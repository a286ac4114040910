"""Initializers of experts and routers: values that are not plain copies of the dense model."""

from nemo_upcycle.initializers import (  # noqa: F401  (registers the initializers)
    data_aware,
    experts,
    routers,
)
from nemo_upcycle.initializers.neurons import Neurons
from nemo_upcycle.initializers.registry import (
    Initializer,
    RouterInitializer,
    make_initializer,
    make_router_initializer,
    names,
    register,
    register_router,
    router_names,
)
from nemo_upcycle.initializers.router import initialize_router
from nemo_upcycle.initializers.rows import RouterRows, Values
from nemo_upcycle.initializers.statistics import Statistics, Target

__all__ = [
    "Initializer",
    "Neurons",
    "RouterInitializer",
    "RouterRows",
    "Statistics",
    "Target",
    "Values",
    "initialize_router",
    "make_initializer",
    "make_router_initializer",
    "names",
    "register",
    "register_router",
    "router_names",
]

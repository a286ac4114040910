"""Initialisers of experts and routers: values that are not plain copies of the dense model."""

from nemo_upcycle.initializers import experts  # noqa: F401  (registers the initialisers)
from nemo_upcycle.initializers.neurons import Neurons
from nemo_upcycle.initializers.registry import Initializer, make_initializer, names, register
from nemo_upcycle.initializers.router import initialize_router

__all__ = [
    "Initializer",
    "Neurons",
    "initialize_router",
    "make_initializer",
    "names",
    "register",
]

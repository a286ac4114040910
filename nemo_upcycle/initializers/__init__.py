"""What fills the MoE where it is not a plain copy of the dense model: experts and routers."""

from nemo_upcycle.initializers import experts  # noqa: F401  (registers them)
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

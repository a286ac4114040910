"""What fills the MoE where the dense model has nothing to copy."""

from nemo_upcycle.initializers.router import random_router

__all__ = ["random_router"]

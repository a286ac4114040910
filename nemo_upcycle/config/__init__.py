"""What is asked for: the upcycling, and how the model is spread over ranks."""

from nemo_upcycle.config.folding import (
    ACCOUNTED_LAYERS,
    RECOMPUTE,
    UNEVEN_STAGES,
    ParallelFolding,
)
from nemo_upcycle.config.upcycling import (
    LARGEST_NUMBER,
    LARGEST_SEED,
    Exactness,
    Scales,
    UpcyclingConfig,
)

__all__ = [
    "ACCOUNTED_LAYERS",
    "LARGEST_NUMBER",
    "LARGEST_SEED",
    "RECOMPUTE",
    "UNEVEN_STAGES",
    "Exactness",
    "ParallelFolding",
    "Scales",
    "UpcyclingConfig",
]

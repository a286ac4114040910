"""What is asked for: the upcycling, and how the model is spread over ranks."""

from nemo_upcycle.config.upcycling import (
    ACCOUNTED_LAYERS,
    LARGEST_SEED,
    RECOMPUTE,
    UNEVEN_STAGES,
    Exactness,
    ParallelFolding,
    Scales,
    UpcyclingConfig,
)

__all__ = [
    "ACCOUNTED_LAYERS",
    "LARGEST_SEED",
    "RECOMPUTE",
    "UNEVEN_STAGES",
    "Exactness",
    "ParallelFolding",
    "Scales",
    "UpcyclingConfig",
]

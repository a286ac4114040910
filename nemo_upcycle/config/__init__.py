"""The user's choices: the upcycling, the parallel mapping, the precision."""

from nemo_upcycle.config.folding import (
    ACCOUNTED_LAYERS,
    RECOMPUTE,
    UNEVEN_STAGES,
    ParallelFolding,
)
from nemo_upcycle.config.optimizer import OPTIMIZER_STATE, OptimizerStorage
from nemo_upcycle.config.precision import PRECISIONS, Precision
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
    "OPTIMIZER_STATE",
    "PRECISIONS",
    "RECOMPUTE",
    "UNEVEN_STAGES",
    "Exactness",
    "OptimizerStorage",
    "ParallelFolding",
    "Precision",
    "Scales",
    "UpcyclingConfig",
]

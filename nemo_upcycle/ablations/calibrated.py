"""Statistics of the dense model over the training text, for the arms that need them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nemo_upcycle.ablations.arms import STATISTICS
from nemo_upcycle.ablations.results import CALIBRATION, Workspace
from nemo_upcycle.calibration.calibrate import Calibration, calibrate
from nemo_upcycle.config import UpcyclingConfig


def statistics_of(
    workspace: Workspace, file: Path, length: int, processes: int, show: Callable[..., None]
) -> None:
    """Calibrate the dense model over the first documents of each corpus, unless it is done.

    Args:
        workspace: The data and the dense checkpoint.
        file: The file to write.
        length: Tokens per sequence.
        processes: Number of processes.
        show: Called with tokens done, tokens in all layers, and the layer.

    Raises:
        UpcyclingError: The checkpoint cannot be computed, or there are other statistics.
    """
    texts = tuple(str(path.file(".bin")) for path in workspace.paths)
    calibration = Calibration(
        str(workspace.dense),
        texts,
        file,
        sequence_length=length,
        cluster_rank=workspace.architecture.hidden_size // 2,
        **CALIBRATION,
    )
    calibrate(calibration, processes, show)


def with_statistics(upcycling: UpcyclingConfig, file: Path) -> UpcyclingConfig:
    """Return the config with the path of the statistics instead of the word that stands for it."""
    return replace(
        upcycling,
        initializer=upcycling.initializer.replace(STATISTICS, str(file)),
        router_initializer=upcycling.router_initializer.replace(STATISTICS, str(file)),
    )

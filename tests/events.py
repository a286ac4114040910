"""Event files as a run writes them."""

from collections.abc import Mapping
from pathlib import Path


def write_events(
    directory: Path, scalars: Mapping[str, Mapping[int, float]], start: float = 0.0
) -> Path:
    """Write one event file; the wall time of each scalar is start + step, in seconds."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(directory), filename_suffix=f".{start}")
    for tag, series in scalars.items():
        for step, value in series.items():
            writer.add_scalar(tag, value, step, walltime=start + step)
    writer.close()
    return max(directory.glob(f"*.{start}"))

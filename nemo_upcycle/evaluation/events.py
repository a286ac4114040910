"""Read the numbers that runs log from TensorBoard's event files."""

from collections.abc import Sequence
from pathlib import Path

from nemo_upcycle.errors import UpcyclingError


def event_files(directory: Path) -> list[Path]:
    """Return the event files below a directory."""
    return sorted(path for path in directory.rglob("*tfevents*") if path.is_file())


def read_scalars(files: Sequence[Path]) -> dict[str, dict[int, float]]:
    """Return {tag: {step: value}} of all files; the value written last counts.

    Args:
        files: Event files of one run, whatever their order.

    Raises:
        UpcyclingError: TensorBoard is not installed.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import (
            STORE_EVERYTHING_SIZE_GUIDANCE,
            EventAccumulator,
        )
    except ImportError:
        raise UpcyclingError(
            f"{files[0]} is read with TensorBoard, which is not installed: pip install tensorboard"
        ) from None

    latest: dict[str, dict[int, tuple[float, float]]] = {}
    for file in files:
        # One file at a time and without purging: files are merged here.
        events = EventAccumulator(
            str(file), STORE_EVERYTHING_SIZE_GUIDANCE, purge_orphaned_data=False
        ).Reload()
        for tag in events.Tags()["scalars"]:
            series = latest.setdefault(tag, {})
            for event in events.Scalars(tag):
                if event.step not in series or event.wall_time >= series[event.step][0]:
                    series[event.step] = event.wall_time, event.value
    return {
        tag: {step: value for step, (_, value) in series.items()} for tag, series in latest.items()
    }

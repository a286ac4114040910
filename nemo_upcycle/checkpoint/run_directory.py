"""The checkpoints of a run: which are complete, and which is the last. Does not import NeMo."""

import re
from pathlib import Path

from nemo_upcycle.checkpoint.huggingface import resolve_directory
from nemo_upcycle.checkpoint.megatron import TRACKER
from nemo_upcycle.errors import UpcyclingError, listing

UNFINISHED = "-unfinished"
"""Suffix of NeMo's marker beside a checkpoint, removed once the checkpoint is complete."""

_STEP = re.compile(r"step=(\d+)")
# Unlike the recipes' names, NeMo's own have no step.
_SAMPLES = re.compile(r"consumed_samples=\d+")
_LAST = re.compile(r"-last(-v\d+)?$")
_WRITTEN_LAST = ("weights/metadata.json", "metadata.json")


def resolve_trained(source: str | Path) -> Path:
    """Return the directory of a trained model; for a run, of the last complete checkpoint.

    Args:
        source: A checkpoint of any format; the directory of a NeMo run, or the run's
            `checkpoints`; or a hub name in the local Hugging Face cache.

    Returns:
        The directory; `source` itself if it is a checkpoint. Anything that is not a run is
        returned unchanged: opening it gives the error.

    Raises:
        UpcyclingError: There is no such directory, or the run has no complete checkpoint.
    """
    directory = resolve_directory(source)
    if _is_one_checkpoint(directory):
        return directory
    checkpoints = checkpoints_of(directory)
    complete = [path for path in checkpoints if is_complete(path)]
    if checkpoints and not complete:
        raise UpcyclingError(
            f"{directory} is a run without a complete checkpoint: "
            f"{listing([path.name for path in checkpoints])} was not saved completely. Let the run "
            "continue until a checkpoint is complete."
        )
    return complete[-1] if complete else directory


def checkpoints_of(run: Path) -> list[Path]:
    """Return the checkpoints of a run, complete or not, in order.

    Args:
        run: The directory of a run, or the run's `checkpoints`.
    """
    inside = run / "checkpoints"
    directory = inside if inside.is_dir() else run
    checkpoints = (
        path
        for path in directory.iterdir()
        if path.is_dir()
        and any(pattern.search(path.name) for pattern in (_LAST, _STEP, _SAMPLES))
        and not path.name.endswith(UNFINISHED)
    )
    return sorted(checkpoints, key=age)


def is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint is complete.

    Args:
        checkpoint: The checkpoint's directory.

    Returns:
        False while the checkpoint is being written or removed, and if either was killed.
    """
    # Megatron writes this file last.
    written = any((checkpoint / name).is_file() for name in _WRITTEN_LAST)
    return written and not checkpoint.with_name(checkpoint.name + UNFINISHED).exists()


def age(checkpoint: Path) -> tuple[int, bool, float]:
    """Sort key: the step in the name, or else the time; `-last` comes after the same step."""
    # The run's name, which comes first, may contain a step too.
    steps = _STEP.findall(checkpoint.name)
    return (
        int(steps[-1]) if steps else -1,
        bool(_LAST.search(checkpoint.name)),
        checkpoint.stat().st_mtime,
    )


def _is_one_checkpoint(directory: Path) -> bool:
    """Return whether a directory is itself a checkpoint, by the files directly in it."""
    names = ("config.json", "weights", ".metadata", "metadata.json", "common.pt", TRACKER)
    return any((directory / name).exists() for name in names)

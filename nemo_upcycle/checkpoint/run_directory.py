"""The checkpoints of a run: which are complete, and which is the last. Knows nothing of NeMo."""

import re
from pathlib import Path

from nemo_upcycle.checkpoint.huggingface import resolve_directory
from nemo_upcycle.checkpoint.megatron import TRACKER
from nemo_upcycle.errors import UpcyclingError, listing

UNFINISHED = "-unfinished"
"""How the marker beside a checkpoint ends, which NeMo removes once the checkpoint is whole."""

_STEP = re.compile(r"step=(\d+)")
# NeMo's own names, unlike the recipes', have no step.
_SAMPLES = re.compile(r"consumed_samples=\d+")
_LAST = re.compile(r"-last(-v\d+)?$")
_WRITTEN_LAST = ("weights/metadata.json", "metadata.json")


def resolve_trained(source: str | Path) -> Path:
    """Return the directory of a trained model: of a run, that of its last complete checkpoint.

    Args:
        source: A checkpoint of any format; the directory of a run of NeMo's, or the `checkpoints`
            in it; or a hub name that is in the local Hugging Face cache.

    Returns:
        The directory, `source` itself where that is a checkpoint. What is no run is returned as
        it is: whoever opens it says what is wrong with it.

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
            f"{listing([path.name for path in checkpoints])} was not saved to its end. Let the run "
            "go on until it has saved one."
        )
    return complete[-1] if complete else directory


def checkpoints_of(run: Path) -> list[Path]:
    """Return the checkpoints that a run has saved, whole or not, the last one last.

    Args:
        run: The directory of a run, or the `checkpoints` in it.
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
    """Return whether all of a checkpoint is there.

    Args:
        checkpoint: Its directory.

    Returns:
        False while it is written or removed, and where a kill has ended either.
    """
    # Megatron writes it last.
    written = any((checkpoint / name).is_file() for name in _WRITTEN_LAST)
    return written and not checkpoint.with_name(checkpoint.name + UNFINISHED).exists()


def age(checkpoint: Path) -> tuple[int, bool, float]:
    """Order by the step in the name, and where it has none by time; `-last` after its equal."""
    # The run's name, which comes first, may have a step in it too.
    steps = _STEP.findall(checkpoint.name)
    return (
        int(steps[-1]) if steps else -1,
        bool(_LAST.search(checkpoint.name)),
        checkpoint.stat().st_mtime,
    )


def _is_one_checkpoint(directory: Path) -> bool:
    """Return whether a directory itself is one: its files say so, not what lies beside them."""
    names = ("config.json", "weights", ".metadata", "metadata.json", "common.pt", TRACKER)
    return any((directory / name).exists() for name in names)

"""The directory of a run of Megatron-LM's or Megatron-Bridge's: its checkpoints, its beginning."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from nemo_upcycle.checkpoint.kept import UPCYCLED_FROM
from nemo_upcycle.checkpoint.megatron import TRACKER
from nemo_upcycle.engine.provenance import Origin
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.files import write_whole

_TRACKERS = (TRACKER, "latest_train_state.pt")
"""What Megatron-LM and Bridge write beside the directories of checkpoints, the latest's number."""

_OF_CHECKPOINT = ("metadata.json", ".metadata", "run_config.yaml")


def checkpoint_to_resume(directory: Path) -> Path | None:
    """Return the directory if Megatron would resume from it, None where a run begins.

    Args:
        directory: Of a run, or, as Bridge takes it too, of one of its checkpoints.
    """
    has_checkpoint = any((directory / name).is_file() for name in (*_TRACKERS, *_OF_CHECKPOINT))
    return directory if has_checkpoint else None


def write_origin(origin: Origin, run: Path) -> None:
    """Record what a run begins from.

    Args:
        origin: What it begins from.
        run: The run's directory; made where it is not.

    Raises:
        UpcyclingError: The directory cannot be written to.
    """
    try:
        write_whole(run / UPCYCLED_FROM, origin.to_json())
    except OSError as error:
        raise UpcyclingError(
            f"{run} cannot be written to: {error.strerror or error}. The run keeps in it what it "
            "began from, and its checkpoints. Give a directory that can be written to."
        ) from error


def read_origin(directory: Path) -> Origin | None:
    """Return what a run has begun from, None where nothing is recorded.

    Args:
        directory: The run's, or that of one of its checkpoints.

    Raises:
        UpcyclingError: What is recorded is damaged.
    """
    is_checkpoint = any((directory / name).is_file() for name in _OF_CHECKPOINT)
    path = (directory.resolve().parent if is_checkpoint else directory) / UPCYCLED_FROM
    try:
        return _origin(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UpcyclingError(
            f"{path} does not say what the run began from ({error!r}). It is damaged: restore it, "
            "or remove it to resume without the comparison."
        ) from error


def _origin(found: Any) -> Origin:
    known = {field.name for field in fields(Origin)}
    origin = Origin(**{name: value for name, value in found.items() if name in known})
    # JSON has no tuples.
    upcycling = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in origin.upcycling.items()
    }
    return Origin(**{**vars(origin), "upcycling": upcycling})

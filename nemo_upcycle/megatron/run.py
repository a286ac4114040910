"""The directory of a run of Megatron-LM or Megatron-Bridge: checkpoints, and the run's origin."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from nemo_upcycle.checkpoint.beside import UPCYCLED_FROM
from nemo_upcycle.checkpoint.megatron import TRACKER
from nemo_upcycle.engine.provenance import Origin
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.files import write_whole

_TRACKERS = (TRACKER, "latest_train_state.pt")
"""Files that Megatron-LM and Bridge write beside the checkpoints: the number of the latest."""

_OF_CHECKPOINT = ("metadata.json", ".metadata", "run_config.yaml")


def checkpoint_to_resume(directory: Path) -> Path | None:
    """Return the directory if Megatron would resume from the directory; None if a run begins.

    Args:
        directory: Directory of a run; or of one checkpoint, which Bridge accepts too.
    """
    has_checkpoint = any((directory / name).is_file() for name in (*_TRACKERS, *_OF_CHECKPOINT))
    return directory if has_checkpoint else None


def write_origin(origin: Origin, run: Path) -> None:
    """Record a run's origin.

    Args:
        origin: The origin.
        run: The run's directory, which is created if missing.

    Raises:
        UpcyclingError: The directory cannot be written to.
    """
    try:
        write_whole(run / UPCYCLED_FROM, origin.to_json())
    except OSError as error:
        raise UpcyclingError(
            f"{run} cannot be written to: {error.strerror or error}. The directory keeps the run's "
            "origin and checkpoints. Give a directory that can be written to."
        ) from error


def read_origin(directory: Path) -> Origin | None:
    """Return a run's origin; None if nothing is recorded.

    Args:
        directory: Directory of the run, or of one of the run's checkpoints.

    Raises:
        UpcyclingError: The record is damaged.
    """
    is_checkpoint = any((directory / name).is_file() for name in _OF_CHECKPOINT)
    path = (directory.resolve().parent if is_checkpoint else directory) / UPCYCLED_FROM
    try:
        return _origin(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UpcyclingError(
            f"{path} does not say what the run began from ({error!r}). The file is damaged: "
            "restore the file, or remove the file to resume without the comparison."
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

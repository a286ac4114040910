"""What a Megatron checkpoint holds beside tensors: the training's arguments, callbacks' records.

A file of its own, `common.pt`, up to Megatron-Core 0.18 or so; a part of a `.distcp` file since.
"""

from pathlib import Path
from typing import Any

from nemo_upcycle.checkpoint.torch_save import read_pickle
from nemo_upcycle.checkpoint.unpickle import unpickle
from nemo_upcycle.errors import UpcyclingError

_PART = "common_state/shard_0_1"
"""Key of the part in `.metadata`."""


def read_common_state(weights: Path) -> dict[str, Any] | None:
    """Return what is beside the tensors, inert as `unpickle` leaves it; None where nothing is.

    Args:
        weights: Directory of `.metadata`.

    Raises:
        UpcyclingError: It is damaged.
    """
    file = weights / "common.pt"
    if file.is_file():
        found = read_pickle(file)
    else:
        place = _place(weights)
        if place is None:
            return None
        found = read_pickle(*place)
        found = found[0] if isinstance(found, list) and found else found
    return found if isinstance(found, dict) else None


def _place(weights: Path) -> tuple[Path, int, int] | None:
    """Return the file, the first byte and the length of the part; None where there is none."""
    path = weights / ".metadata"
    if not path.is_file():
        return None
    try:
        metadata = unpickle(path.read_bytes(), path)
    except OSError as error:
        raise UpcyclingError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        for key, info in metadata.state["storage_data"].items():
            if key.state["fqn"] == _PART:
                place = info.state
                name, start, length = (place[n] for n in ("relative_path", "offset", "length"))
                if Path(name).name != name or not (int(start) >= 0 and int(length) >= 0):
                    raise ValueError(f"{_PART} is said to be in {name!r} at {start}")
                return weights / name, int(start), int(length)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UpcyclingError(f"{path} is damaged: {error!r}. Copy the checkpoint again.") from error
    return None

"""What a checkpoint holds beside tensors is found in both places, and nothing in it is run."""

import io
import os
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from nemo_upcycle.checkpoint.common_state import read_common_state
from nemo_upcycle.checkpoint.megatron_config import read_args
from nemo_upcycle.errors import UpcyclingError

KEY = "common_state/shard_0_1"
ARGS = Namespace(num_layers=2, swiglu=True, num_attention_heads=4)


class Payload:
    """Runs a command where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def write(directory: Path, state: Any, **place: Any) -> Path:
    """Write a common state as Megatron-Core 0.19 does, into a part of a file."""
    buffer = io.BytesIO()
    torch.save([state], buffer)
    data = buffer.getvalue()
    (directory / "__0_0.distcp").write_bytes(b"tensors" + data + b"more of them")
    found = {"relative_path": "__0_0.distcp", "offset": 7, "length": len(data), **place}
    metadata = Metadata({}, storage_data={MetadataIndex(KEY): _StorageInfo(**found)})
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    return directory


def test_a_part_of_a_file_is_read(tmp_path: Path) -> None:
    found = read_args(write(tmp_path, {"args": ARGS, "iteration": 3}))
    assert found["num_layers"] == 2
    assert found["activation_func"] == "silu"


def test_a_file_of_its_own_comes_first(tmp_path: Path) -> None:
    torch.save({"iteration": 5}, write(tmp_path, {"iteration": 3}) / "common.pt")
    assert read_common_state(tmp_path) == {"iteration": 5}


def test_nothing_is_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    found = read_common_state(write(tmp_path, {"iteration": 3, "extra": Payload(marker)}))
    assert found is not None
    assert found["iteration"] == 3
    assert not marker.exists()


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"relative_path": "../__0_0.distcp"}, "is damaged"),
        ({"relative_path": "missing.distcp"}, "cannot be read"),
        ({"offset": -1}, "is damaged"),
        ({"offset": 20}, "cannot be read"),
        ({"length": 30}, "cannot be read"),
    ],
)
def test_wrong_places_are_refused(tmp_path: Path, place: dict[str, Any], said: str) -> None:
    write(tmp_path, {"args": ARGS}, **place)
    with pytest.raises(UpcyclingError, match=said):
        read_common_state(tmp_path)


def test_where_there_is_none(tmp_path: Path) -> None:
    assert read_common_state(tmp_path) is None

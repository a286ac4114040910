"""Nothing in a checkpoint's files is run."""

import json
import os
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    Metadata,
)

from nemo_upcycle.checkpoint import MegatronCheckpoint, open_checkpoint
from nemo_upcycle.errors import UpcyclingError
from tests.megatron_checkpoints import (
    ARGS,
    LAYERS,
    architecture,
    change_metadata,
    place,
    read,
    save,
    save_nemo,
    tensors,
)


class Payload:
    """A pickle of it runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.command = f"touch '{trace}'"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def _in_metadata(directory: Path, payload: Payload) -> None:
    change_metadata(directory, lambda m: setattr(m, "planner_data", payload))


def _as_metadata(directory: Path, payload: Payload) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(payload))


def _in_args(directory: Path, payload: Payload) -> None:
    torch.save({"args": Namespace(**ARGS, rng=payload)}, directory / "common.pt")


def _as_args(directory: Path, payload: Payload) -> None:
    torch.save({"args": payload}, directory / "common.pt")


def _in_weights(directory: Path, payload: Payload) -> None:
    """Put the payload where the first tensor was."""
    path = directory / "__0_0.distcp"
    data = path.read_bytes()
    torch.save(payload, path)
    length = path.stat().st_size
    path.write_bytes(path.read_bytes() + data)

    def change(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            if info.relative_path == path.name:
                info.offset += length
        place(metadata).offset, place(metadata).length = 0, length

    change_metadata(directory, change)


ATTACKS = {
    "in .metadata": (_in_metadata, None),
    "instead of .metadata": (_as_metadata, "does not describe a complete checkpoint"),
    "in args": (_in_args, None),
    "instead of args": (_as_args, "no args in common.pt"),
    "in the weights": (_in_weights, "it holds a posix.system"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_pickle_is_run(tmp_path: Path, attack: str) -> None:
    attacked, message = ATTACKS[attack]
    directory, trace = save(tmp_path / "saved", tensors()), tmp_path / "trace"
    attacked(directory, Payload(trace))
    outcome = "inert"
    try:
        architecture(directory)
        checkpoint = MegatronCheckpoint(directory)
        for name in checkpoint.tensors:
            read(checkpoint, name)
    except UpcyclingError as error:
        outcome = str(error)
    assert not trace.exists()
    if message is None:
        assert outcome == "inert"
    else:
        with pytest.raises(UpcyclingError, match=message):
            raise UpcyclingError(outcome)


def test_the_payload_does_run_when_it_is_unpickled(tmp_path: Path) -> None:
    """So that the test above can fail."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


def test_nothing_in_a_context_is_run(tmp_path: Path) -> None:
    nemo, trace = save_nemo(tmp_path / "nemo", tensors()), tmp_path / "trace"
    model = nemo / "context" / "model.yaml"
    command = f"touch {trace}"
    tags = [f'!!python/object/apply:os.system ["{command}"]', "!!python/name:os.system ''"]
    lines = "".join(f"  attack{index}: {tag}\n" for index, tag in enumerate(tags))
    model.write_text(model.read_text().replace("config:\n", "config:\n" + lines))
    target = {"_target_": "os.system", "command": command}
    (nemo / "context" / "io.json").write_text(json.dumps({"root": target}))
    assert architecture(nemo).num_layers == LAYERS
    assert not trace.exists()
    model.write_text(tags[0])
    with pytest.raises(UpcyclingError, match=r"cannot be read as NeMo 2's model\.yaml"):
        open_checkpoint(str(nemo))
    assert not trace.exists()

"""Checkpoints of a check: saved as NeMo 2 does, loaded under another mapping, exported."""

import hashlib
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.core import dist_checkpointing

from nemo_upcycle.check.models import Chunks, fill_with_nan, shards
from nemo_upcycle.check.subject import Subject
from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.trained.export import export


def state_of(chunks: Chunks) -> dict[str, Any]:
    """Return a rank's weights, to be saved or loaded."""
    return {f"model{index}": chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}


def load_weights(chunks: Chunks, state: dict[str, Any]) -> None:
    """Put loaded weights into a rank's models; see `state_of`."""
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{index}"])


def save(chunks: Chunks, subject: Subject, folding: ParallelFolding, directory: Path) -> None:
    """Save the weights with the config that NeMo 2 keeps; every rank must call this."""
    weights = directory / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(state_of(chunks), str(weights))
    if torch.distributed.get_rank() == 0:
        plain = bool | int | float | str | list | None
        fields = subject.fields(folding).items()
        config = {name: value for name, value in fields if isinstance(value, plain)}
        (directory / "context").mkdir(exist_ok=True)
        (directory / "context" / "model.yaml").write_text(yaml.safe_dump({"config": config}))
    torch.distributed.barrier()


def differing_after_load(chunks: Chunks, directory: Path) -> list[str]:
    """Load a checkpoint; return names of parameters whose bits differ from the model's before."""
    before = shards(chunks)
    fill_with_nan(chunks)
    load_weights(chunks, dist_checkpointing.load(state_of(chunks), str(directory / "weights")))
    return sorted(
        {
            shard.name
            for (shard, values), (_, loaded) in zip(before, shards(chunks), strict=True)
            if not torch.equal(values, loaded)
        }
    )


def exported_digest(source: Path, directory: Path) -> str:
    """Export a checkpoint to a new directory; return the digest of its weights."""
    export(source, directory)
    return digest(directory)


def digest(directory: Path) -> str:
    """Return what tells the weights of a Hugging Face directory from others, to the last bit."""
    found = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            for block in iter(lambda: file.read(2**24), b""):
                found.update(block)
    return found.hexdigest()[:16]

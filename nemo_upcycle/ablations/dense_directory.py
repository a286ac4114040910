"""A dense model that was trained on one rank, as a Hugging Face directory."""

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.utils.model_utils import unwrap_model
from safetensors.torch import load_file, save_file

from nemo_upcycle.checkpoint import HuggingFaceCheckpoint
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.engine.owned_shards import owned_shards
from nemo_upcycle.files import whole_directory
from nemo_upcycle.plans.rank import make_plan


def write_dense(model: torch.nn.Module, source: Path, directory: Path) -> None:
    """Write a copy of a Hugging Face directory, with a model's weights instead.

    The plan that fills a model from the directory is executed backwards.

    Args:
        model: A dense Megatron-Core model on one rank, made from `source`.
        source: The directory.
        directory: Output directory, which is replaced if it exists, and complete when it appears.

    Raises:
        UpcyclingError: The directory cannot be read.
    """
    owned = owned_shards(model)
    with HuggingFaceCheckpoint(source) as dense:
        plan = make_plan(
            [own.shard for own in owned],
            dense.tensors,
            dense.family,
            dense.architecture,
            UpcyclingConfig(num_moe_experts=None),
            branches=1,
        )
        assert plan.tensors == dense.tensors.keys()  # none stays as it was
    shutil.rmtree(directory, ignore_errors=True)
    with whole_directory(directory) as copy:
        shutil.copytree(source, copy, dirs_exist_ok=True)
        for file in copy.glob("*.safetensors"):
            tensors = load_file(file)
            for block, targets in plan.copies.items():
                if block.tensor in tensors:
                    start, stop = targets[0].rows
                    values, stored = owned[targets[0].shard].data[start:stop], tensors[block.tensor]
                    stored[slice(*block.rows)] = values.to(stored.dtype)
            save_file(tensors, file, {"format": "pt"})


class KeptWeights(pl.Callback):
    """A callback that writes the weights after the last step; see `write_dense`.

    Args:
        source: The directory that the model was made from.
        directory: Output directory.
    """

    def __init__(self, source: Path, directory: Path) -> None:
        self.source, self.directory = source, directory

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Write the weights."""
        (chunk,) = trainer.strategy.megatron_parallel
        write_dense(unwrap_model(chunk.module), self.source, self.directory)

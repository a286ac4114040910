"""A checkpoint of any kind, with functions that fill Megatron's models."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.checkpoint import gguf_in, open_checkpoint
from nemo_upcycle.checkpoint.described import check_whole
from nemo_upcycle.checkpoint.dtypes import torch_dtype
from nemo_upcycle.checkpoint.huggingface import is_huggingface, read_config, resolve_directory
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.engine.load import check_all_used, fill, restore
from nemo_upcycle.families import FAMILIES
from nemo_upcycle.families.model import MoEModel, upcycled_model
from nemo_upcycle.trained.opened import open_trained
from nemo_upcycle.trained.restore import check_all_restored


@dataclass(frozen=True)
class LoadableCheckpoint:
    """A checkpoint, opened by headers.

    Attributes:
        model: The model in the checkpoint, dense or MoE.
        dtype: dtype of the parameters.
        fill: Fills this rank's Megatron-Core GPT models, one per virtual pipeline stage.
        check: Takes the results of `fill` of all ranks; raises `UpcyclingError` if the ranks
            together have not used the whole checkpoint.
    """

    model: MoEModel
    dtype: torch.dtype
    fill: Callable[[Sequence[torch.nn.Module]], Any]
    check: Callable[[Sequence[Any]], None]


def open_loadable(source: str | Path) -> LoadableCheckpoint:
    """Open a checkpoint for loading without upcycling.

    Args:
        source: A NeMo 2 or Megatron-LM checkpoint saved under any mapping, or a Hugging Face
            directory, dense or MoE; or a GGUF file of a dense model.

    Raises:
        UpcyclingError: The checkpoint cannot be read, or Megatron cannot compute the model.
    """
    directory = resolve_directory(source)
    if _is_dense(directory):
        return _dense(directory)
    trained = open_trained(directory)
    return LoadableCheckpoint(
        trained.model,
        torch_dtype(trained.dtype),
        partial(restore, trained=trained),
        lambda used: check_all_restored(trained, frozenset().union(*used)),
    )


def _is_dense(directory: Path) -> bool:
    """Return whether a directory is of Hugging Face or GGUF, of a supported dense family."""
    if not is_huggingface(directory):
        return gguf_in(directory) is not None
    return str(read_config(directory).get("model_type")) in FAMILIES


def _dense(directory: Path) -> LoadableCheckpoint:
    checkpoint, dense = open_checkpoint(str(directory)), UpcyclingConfig(num_moe_experts=None)
    check_whole(checkpoint)
    family, arch = checkpoint.family, checkpoint.architecture
    first = next(iter(family.shapes(arch)))
    return LoadableCheckpoint(
        upcycled_model(arch, dense),
        torch_dtype(checkpoint.tensors[first].dtype),
        partial(fill, checkpoint=checkpoint, upcycling=dense),
        partial(check_all_used, checkpoint),
    )

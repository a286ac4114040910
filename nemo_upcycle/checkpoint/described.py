"""A dense checkpoint with format, family and architecture.

All readers of a dense checkpoint's config use this module, so that a source is found and read once.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from nemo_upcycle.checkpoint import DenseCheckpoint, TensorInfo
from nemo_upcycle.checkpoint.branches import open_branches, open_parts, split_sources
from nemo_upcycle.checkpoint.checks import check_tensors
from nemo_upcycle.checkpoint.dtypes import dtype_called
from nemo_upcycle.checkpoint.foreign import check_dense
from nemo_upcycle.checkpoint.huggingface import (
    HuggingFaceCheckpoint,
    find_directory,
    is_huggingface,
    read_config,
)
from nemo_upcycle.families import Architecture, Family, family_of
from nemo_upcycle.families.model import MoEModel
from nemo_upcycle.families.moe_config import MOE_FAMILIES, moe_model


@dataclass(frozen=True)
class Dense:
    """A dense model to plan for.

    Attributes:
        source: Path or name of the checkpoint.
        note: Which parts of the checkpoint were available.
        family: The dense model's family.
        arch: The dense model's architecture.
        tensors: The tensors; from the config if the weights are not available.
        branches: Number of dense checkpoints.
    """

    source: str
    note: str
    family: Family
    arch: Architecture
    tensors: Mapping[str, TensorInfo]
    branches: int = 1

    @property
    def bytes(self) -> int:
        """Size of all tensors in the files."""
        used = (info for name, info in self.tensors.items() if self._is_used(name))
        return sum(info.stored(info.bytes) * info.sources for info in used)

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return sum(prod(shape) for shape in self.family.shapes(self.arch).values())

    @property
    def dtypes(self) -> list[str]:
        """The dtypes of the tensors."""
        return sorted({info.dtype for name, info in self.tensors.items() if self._is_used(name)})

    def _is_used(self, name: str) -> bool:
        return name in self._known

    @cached_property
    def _known(self) -> Collection[str]:
        """The names of the tensors that the family has."""
        return self.family.shapes(self.arch).keys()


def dense_of_config(config: dict[str, Any], source: str, note: str) -> Dense:
    """Return the dense model that a Hugging Face config describes.

    Args:
        config: The parsed `config.json`; without a dtype, BF16 is assumed.
        source: Path or name of the model.
        note: A remark on the weights, which are not available.
    """
    family = family_of(config)
    return _described(config, family, family.architecture(config), source, note)


def _described(
    config: Mapping[str, Any], family: Family, arch: Architecture, source: str, note: str
) -> Dense:
    said = config.get("dtype") or config.get("torch_dtype")  # transformers 5, or earlier
    dtype = dtype_called(said) or "BF16"
    shapes = family.shapes(arch)
    tensors = {name: TensorInfo(shape, dtype) for name, shape in shapes.items()}
    return Dense(source, note, family, arch, tensors)


def open_dense(source: str) -> Dense:
    """Open a dense checkpoint by headers, or by `config.json` if nothing else is there.

    Args:
        source: A source for `open_branches`, a directory with `config.json` alone, or the path of
            a `config.json`, whose weights are not looked at.

    Raises:
        UpcyclingError: The checkpoint cannot be read, or cannot be upcycled.
    """
    if (directory := config_alone(source)) is not None:
        note = "config.json alone, without weights"
        config = HuggingFaceCheckpoint(directory).config
        check_dense(config, directory)
        return dense_of_config(config, source, note)
    checkpoint = open_branches(source)
    check_whole(checkpoint)
    packed = sum(info.packed is not None for info in checkpoint.tensors.values())
    more = f"; {packed} quantized weights, dequantized while read" if packed else ""
    return Dense(
        source,
        f"headers read and checked{more}",
        checkpoint.family,
        checkpoint.architecture,
        checkpoint.tensors,
        len(checkpoint.branches),
    )


def moe_here(source: str) -> MoEModel | None:
    """Return what the config of a Hugging Face MoE on this machine says; None for other sources.

    Args:
        source: A source for `open_branches`.

    Raises:
        UpcyclingError: The source cannot be read, or Megatron cannot compute the MoE.
    """
    config = _moe_config(source)
    return None if config is None else moe_model(config)


def without_experts(source: str) -> Dense | None:
    """Return the dense model that a Hugging Face MoE would be, without weights; see `moe_here`."""
    config = _moe_config(source)
    if config is None:
        return None
    family = MOE_FAMILIES[config["model_type"]].dense
    return _described(config, family, moe_model(config).arch, source, "an MoE's config, no weights")


def _moe_config(source: str) -> dict[str, Any] | None:
    directory = find_directory(source) if split_sources(source) == [source] else None
    if directory is None or not is_huggingface(directory):
        return None
    config = read_config(directory)
    return config if config.get("model_type") in MOE_FAMILIES else None


def config_alone(source: str) -> Path | None:
    """Return the directory of a `config.json` that is all there is of a checkpoint, or is meant.

    Args:
        source: A source for `open_branches`, or the path of a `config.json`.
    """
    path = Path(os.path.expanduser(source))
    if path.name == "config.json" and path.is_file():
        return path.parent
    directory = find_directory(source) if split_sources(source) == [source] else None
    if directory and {path.name for path in directory.glob("*")} == {"config.json"}:
        return directory
    return None


def check_whole(checkpoint: DenseCheckpoint) -> None:
    """Check that a dense checkpoint has the tensors that the config requires.

    Raises:
        UpcyclingError: The checkpoint cannot be upcycled, or tensors and config disagree.
    """
    for branch in checkpoint.branches:
        where = str(branch.directory)
        check_tensors(branch.tensors, checkpoint.family, checkpoint.architecture, where)


def architecture_here(source: str) -> tuple[Architecture | None, list[str]]:
    """Return a dense checkpoint's architecture, if on this machine.

    Args:
        source: A source for `open_branches`.

    Returns:
        The architecture, None if nothing of the source is on this machine. And the missing parts:
            paths that other machines may have, hub names that are not in the local cache.

    Raises:
        UpcyclingError: A source is no dense checkpoint, or architectures differ.
    """
    parts = split_sources(source)
    absent = [part for part in parts if find_directory(part) is None]
    here = [part for part in parts if part not in absent]
    return open_parts(here).architecture if here else None, absent

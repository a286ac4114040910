"""A dense checkpoint that knows its format, its family and its architecture.

Every reader of a dense checkpoint's config comes here: what a source names is found and read once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from nemo_upcycle.checkpoint import DenseCheckpoint, TensorInfo
from nemo_upcycle.checkpoint.branches import open_branches, open_parts, split_sources
from nemo_upcycle.checkpoint.checks import check_tensors
from nemo_upcycle.checkpoint.dtypes import dtype_called
from nemo_upcycle.checkpoint.foreign import check_dense
from nemo_upcycle.checkpoint.huggingface import HuggingFaceCheckpoint, find_directory
from nemo_upcycle.families import Architecture, Family, family_of


@dataclass(frozen=True)
class Dense:
    """A dense model to plan for.

    Attributes:
        source: Where it is.
        note: What of it was there to look at.
        family: The dense model's family.
        arch: The dense model's architecture.
        tensors: Its tensors; by its config where its weights are not there.
        branches: How many dense checkpoints it is.
    """

    source: str
    note: str
    family: Family
    arch: Architecture
    tensors: Mapping[str, TensorInfo]
    branches: int = 1

    @property
    def bytes(self) -> int:
        """Its size."""
        used = (info for name, info in self.tensors.items() if self._is_used(name))
        return sum(info.bytes * info.sources for info in used)

    @property
    def parameters(self) -> int:
        """Its elements."""
        return sum(prod(shape) for shape in self.family.shapes(self.arch).values())

    @property
    def dtypes(self) -> list[str]:
        """The dtypes of its tensors."""
        return sorted({info.dtype for name, info in self.tensors.items() if self._is_used(name)})

    def _is_used(self, name: str) -> bool:
        return name in self.family.shapes(self.arch)


def dense_of_config(config: dict[str, Any], source: str, note: str) -> Dense:
    """Return the dense model that a Hugging Face config describes.

    Args:
        config: The parsed `config.json`; its dtype is taken, BF16 where it says none.
        source: Where it is.
        note: What to say of the weights, which are not there.

    Raises:
        UpcyclingError: It cannot be upcycled.
    """
    family = family_of(config)
    arch = family.architecture(config)
    said = config.get("dtype") or config.get("torch_dtype")  # transformers 5, and before
    dtype = dtype_called(said) or "BF16"
    shapes = family.shapes(arch)
    tensors = {name: TensorInfo(shape, dtype) for name, shape in shapes.items()}
    return Dense(source, note, family, arch, tensors)


def open_dense(source: str) -> Dense:
    """Open a dense checkpoint by its headers, or by its `config.json` where nothing else is there.

    Args:
        source: What `open_branches` takes, or a directory of a `config.json` alone.

    Raises:
        UpcyclingError: It cannot be read, or cannot be upcycled.
    """
    directory = find_directory(source) if split_sources(source) == [source] else None
    if directory and {path.name for path in directory.glob("*")} == {"config.json"}:
        note = "its config.json alone, the weights are not there"
        config = HuggingFaceCheckpoint(directory).config
        check_dense(config, directory)
        return dense_of_config(config, source, note)
    checkpoint = open_branches(source)
    check_whole(checkpoint)
    return Dense(
        source,
        "headers read and checked",
        checkpoint.family,
        checkpoint.architecture,
        checkpoint.tensors,
        len(checkpoint.branches),
    )


def check_whole(checkpoint: DenseCheckpoint) -> None:
    """Check that a dense checkpoint has the tensors that its config says.

    Raises:
        UpcyclingError: It cannot be upcycled, or has other tensors than its config says.
    """
    for branch in checkpoint.branches:
        where = str(branch.directory)
        check_tensors(branch.tensors, checkpoint.family, checkpoint.architecture, where)


def architecture_here(source: str) -> tuple[Architecture | None, list[str]]:
    """Return the numbers of a dense checkpoint, as far as it is on this machine.

    Args:
        source: What `open_branches` takes.

    Returns:
        The numbers, None if nothing of the source is here; and the parts that are not here: paths
        that other machines may have, hub names that are not in this machine's cache.

    Raises:
        UpcyclingError: What is here is no dense checkpoint, or not of one architecture.
    """
    parts = split_sources(source)
    absent = [part for part in parts if find_directory(part) is None]
    here = [part for part in parts if part not in absent]
    return open_parts(here).architecture if here else None, absent

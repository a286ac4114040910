"""Several dense checkpoints as one: experts from each, averages of all other weights.

A feed-forward tensor of branch i has the prefix `i:`. Without a prefix, any name means the average
over all branches.

Source: Branch-Train-MiX, arXiv 2403.07816 §3.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from filecmp import cmp
from functools import cached_property
from pathlib import Path

from nemo_upcycle.checkpoint import DenseCheckpoint, Piece, Span, TensorInfo, open_checkpoint
from nemo_upcycle.checkpoint.dtypes import torch_dtype
from nemo_upcycle.checkpoint.tokenizer_directory import tokenizer_directory
from nemo_upcycle.checkpoint.tokenizer_files import VOCABULARIES, load_tokenizer
from nemo_upcycle.errors import UpcyclingError, listing

_MAY_DIFFER = ("max_position_embeddings", "init_method_std")
"""Fields of an architecture that do not change what the model computes."""


def branch_name(branch: int, tensor: str) -> str:
    """Return the name of a branch's feed-forward tensor."""
    return f"{branch}:{tensor}"


def split_sources(source: str) -> list[str]:
    """Return the dense checkpoints in a text.

    Args:
        source: One checkpoint, or several separated by semicolons, or by commas, at which
            NeMo-Run's command line splits the arguments of a factory.

    Raises:
        UpcyclingError: A name is empty, or the separator is another.
    """
    if source and Path(os.path.expanduser(source)).exists():
        return [source]
    sources = [part.strip() for part in re.split("[,;]", source)]
    if not all(sources) or any(map(_are_several, sources)):
        raise UpcyclingError(
            f"dense_checkpoint is {source!r}; expected one checkpoint, or several separated by "
            "single semicolons: 'DIR1; DIR2'."
        )
    return sources


def _are_several(source: str) -> bool:
    """Return whether a text that is no directory lists several, with another separator."""
    parts = [Path(os.path.expanduser(part)) for part in re.split(r"[\s:|+]+", source)]
    return len(parts) > 1 and not Path(source).is_dir() and all(part.is_dir() for part in parts)


def open_branches(source: str) -> DenseCheckpoint:
    """Open a dense checkpoint, or several as one.

    Args:
        source: A source for `open_checkpoint`, or several; see `split_sources`.

    Returns:
        The checkpoint, or all checkpoints as one.

    Raises:
        UpcyclingError: A checkpoint cannot be read, or architectures or tokenizers differ.
    """
    return open_parts(split_sources(source))


def open_parts(parts: Sequence[str]) -> DenseCheckpoint:
    """Open the dense checkpoints that `split_sources` returns; see `open_branches`."""
    opened = [open_checkpoint(part) for part in parts]
    if len(opened) == 1:
        return opened[0]
    branched = BranchedCheckpoint(opened)
    _check_tokens(parts)
    return branched


def _check_tokens(parts: Sequence[str]) -> None:
    """Check that each row of the averaged embeddings is the same token in all branches.

    A token of one branch only, such as a chat token, may use a row that is unused in the others.
    """
    tokenizers = [(part, tokenizer_directory(part)) for part in parts]
    there = [(part, place) for part, place in tokenizers if place is not None]
    if all(_same_files(there[0][1], place) for _, place in there):
        return
    first, tokens = there[0][0], _tokens(there[0][1])
    for part, place in there[1:]:
        theirs = _tokens(place)
        rows = sorted(row for row in tokens.keys() & theirs if tokens[row] != theirs[row])
        if rows:
            row = rows[0]
            raise UpcyclingError(
                f"The tokenizers of {first} and {part} differ: row {row} of the embeddings is "
                f"{tokens[row]!r} in one and {theirs[row]!r} in the other; {len(rows)} rows differ "
                "in total. Embeddings are averaged over dense checkpoints: give checkpoints that "
                "were trained from the same model, with the same tokenizer."
            )


def _same_files(one: Path, other: Path) -> bool:
    """Return whether two vocabularies are equal byte by byte, which is faster than loading."""
    pairs = [(one / name, other / name) for name in VOCABULARIES]
    return all(
        a.is_file() == b.is_file() and (not a.is_file() or cmp(a, b, shallow=False))
        for a, b in pairs
    )


def _tokens(directory: Path) -> dict[int, str]:
    return {row: token for token, row in load_tokenizer(directory).get_vocab().items()}


class BranchedCheckpoint(DenseCheckpoint):
    """Several dense checkpoints of one architecture.

    Args:
        branches: The checkpoints.

    Raises:
        UpcyclingError: The architectures differ.
    """

    def __init__(self, branches: Sequence[DenseCheckpoint]) -> None:
        super().__init__()
        self._branches = tuple(branches)
        self.directory = branches[0].directory
        self.config = branches[0].config
        for other in branches[1:]:
            self._check_alike(other)

    @property
    def branches(self) -> tuple[DenseCheckpoint, ...]:
        """The checkpoints."""
        return self._branches

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Averages, and each branch's feed-forward tensors, by name."""
        first = self._branches[0].tensors
        names = [name for name in self.family.shapes(self.architecture) if name in first]
        infos = {name: replace(first[name], sources=len(self._branches)) for name in names}
        parts = {
            rows.tensor
            for layer in range(self.architecture.num_layers)
            for rows in self.family.feed_forward(self.architecture, layer).values()
        }
        for index, branch in enumerate(self._branches):
            own = {branch_name(index, name): branch.tensors.get(name) for name in parts}
            infos.update({name: info for name, info in own.items() if info is not None})
        return infos

    def pieces(self, name: str) -> Sequence[Piece]:
        """Return where a tensor is stored in its branch; for an average, in the first branch."""
        branch, own = self._find(name)
        return (branch or self._branches[0]).pieces(own)

    def read_into(self, buffer: memoryview, name: str, rows: Span, columns: Span | None) -> None:
        """Read a block of a tensor; averages are computed in fp32.

        Raises:
            UpcyclingError: A file is gone or shorter than its header says.
        """
        branch, own = self._find(name)
        if branch is not None:
            branch.read_into(buffer, own, rows, columns)
            return
        import torch

        mean_dtype = torch_dtype(self.tensors[own].dtype)
        count = len(buffer) // mean_dtype.itemsize
        total = torch.zeros(count)
        for source in self._branches:
            dtype = torch_dtype(source.tensors[own].dtype)
            raw = bytearray(count * dtype.itemsize)
            source.read_into(memoryview(raw), own, rows, columns)
            total += torch.frombuffer(raw, dtype=dtype).float()
        mean = (total / len(self._branches)).to(mean_dtype)
        buffer[:] = mean.view(torch.uint8).numpy().data

    def close(self) -> None:
        """Close the files of all branches."""
        for branch in self._branches:
            branch.close()

    def _find(self, name: str) -> tuple[DenseCheckpoint | None, str]:
        """Return a tensor's branch (None for an average), and the tensor's name there."""
        index, colon, own = name.partition(":")
        return (self._branches[int(index)], own) if colon else (None, name)

    def _check_alike(self, other: DenseCheckpoint) -> None:
        arch = other.architecture
        different = [
            f"{field.name} {getattr(self.architecture, field.name)} and {getattr(arch, field.name)}"
            for field in fields(arch)
            if field.name not in _MAY_DIFFER
            and getattr(self.architecture, field.name) != getattr(arch, field.name)
        ]
        if other.family.model_type != self.family.model_type:
            different.append(f"model_type {self.family.model_type} and {other.family.model_type}")
        if different:
            raise UpcyclingError(
                f"{self.directory} and {other.directory} are not of one architecture: "
                f"{listing(different)}. Expected checkpoints that were trained from the same model."
            )

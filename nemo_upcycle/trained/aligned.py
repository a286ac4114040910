"""Permute the feed-forward neurons of a dense checkpoint to match those of another.

The order of a layer's neurons does not change what the layer computes. The order matters where
layers of several dense checkpoints are averaged, and for the neurons that a shard gets.

Source: weight matching of Git Re-Basin, arXiv 2209.04836 §3.2, for one layer at a time; alignment
before upcycling, Symphony-MoE, arXiv 2509.18542.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_upcycle.checkpoint import HuggingFaceCheckpoint
from nemo_upcycle.checkpoint.branches import BranchedCheckpoint
from nemo_upcycle.checkpoint.described import check_whole
from nemo_upcycle.checkpoint.dtypes import torch_dtype
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Rows
from nemo_upcycle.progress import Progress, no_progress
from nemo_upcycle.trained.outputs import new_directory

Parts = dict[str, torch.Tensor]
"""Gate (if any), up and down of a layer, each [neurons, hidden]."""


@dataclass(frozen=True)
class Alignment:
    """What aligning has changed.

    Attributes:
        moved: Share of the neurons that have another place.
        before: Distance of the feed-forward weights from the reference's, relative to these.
        after: The same after aligning.
    """

    moved: float
    before: float
    after: float


def align(
    reference: str | Path, other: str | Path, out: Path, progress: Progress = no_progress
) -> Alignment:
    """Write a copy of a dense checkpoint whose neurons are in the reference's order.

    The copy computes the same function. In memory are the feed-forward weights of two layers in
    fp32, and ffn² likenesses in fp64.

    Args:
        reference: A Hugging Face directory.
        other: The directory to align, of the same architecture.
        out: Directory to create.
        progress: Called with layers done, and layers in total.

    Raises:
        UpcyclingError: A directory cannot be read, architectures differ, weights are quantized, or
            scipy is not installed.
    """
    first, second = HuggingFaceCheckpoint(reference), HuggingFaceCheckpoint(other)
    with BranchedCheckpoint([first, second]):
        for checkpoint in (first, second):
            check_whole(checkpoint)
        if second.scaled:
            raise UpcyclingError(
                f"{other} has quantized weights, whose scales are not permuted; expected fp32, "
                "bf16 or fp16. Give the checkpoint that was quantized."
            )
        files = [path for path in second.directory.iterdir() if path.is_file()]
        with new_directory(
            out, sum(path.stat().st_size for path in files), [first.directory, second.directory]
        ) as partial:
            for path in files:
                shutil.copyfile(path, partial / path.name)
            return _align_files(first, second, partial, progress)


def _align_files(
    first: HuggingFaceCheckpoint, second: HuggingFaceCheckpoint, out: Path, progress: Progress
) -> Alignment:
    """Permute the neurons of the second checkpoint in the copies of its files."""
    layers = second.architecture.num_layers
    moved, sums = 0, torch.zeros(3, dtype=torch.float64)
    for layer in range(layers):
        places = second.family.feed_forward(second.architecture, layer)
        ours, theirs = _parts(first, places), _parts(second, places)
        order = matching(ours, theirs)
        moved += int((order != torch.arange(len(order))).sum())
        for part, weights in ours.items():
            aligned = theirs[part][order]
            pair = (theirs[part] - weights, aligned - weights, weights)
            sums += torch.stack([each.double().square().sum() for each in pair])
            _write(second, places[part], part, aligned, out)
        progress(layer + 1, layers)
    before, after, size = sums.sqrt().tolist()
    return Alignment(moved / (layers * len(order)), before / size, after / size)


def matching(reference: Parts, other: Parts) -> torch.Tensor:
    """Return which neuron of the other layer comes to each place of the reference's layer.

    The order maximizes the sum of the inner products of neurons in the same place, over gate, up
    and down.

    Raises:
        UpcyclingError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise UpcyclingError("Aligning needs scipy: pip install scipy.") from error
    likeness = sum(
        (weights.double() @ other[part].double().T for part, weights in reference.items()),
        torch.zeros((), dtype=torch.float64),
    )
    _, order = linear_sum_assignment(likeness.numpy(), maximize=True)
    return torch.from_numpy(order)


def _parts(checkpoint: HuggingFaceCheckpoint, places: Mapping[str, Rows]) -> Parts:
    found: Parts = {}
    for part, rows in places.items():
        info = checkpoint.tensors[rows.tensor]
        span = rows.span(info.shape[0])
        values = torch.empty((span[1] - span[0], info.width), dtype=torch_dtype(info.dtype))
        raw = memoryview(values.view(-1).view(torch.uint8).numpy())
        checkpoint.read_into(raw, rows.tensor, span, None)
        found[part] = values.T.float() if part == "down" else values.float()
    return found


def _write(
    checkpoint: HuggingFaceCheckpoint, rows: Rows, part: str, values: torch.Tensor, out: Path
) -> None:
    """Write a part over the same part in a copy of the file."""
    info = checkpoint.tensors[rows.tensor]
    (piece,) = checkpoint.pieces(rows.tensor)
    stored = (values.T if part == "down" else values).to(torch_dtype(info.dtype)).contiguous()
    start = piece.start + rows.start * info.width * stored.element_size()
    with open(out / piece.file, "r+b") as file:
        file.seek(start)
        file.write(stored.view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())

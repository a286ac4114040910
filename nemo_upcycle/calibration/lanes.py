"""The work of a layer, cut into lanes: sequences that one process computes one after another.

A lane is a unit of what survives a kill. Its files are named after layer and lane:
`hidden-L-N.f32` holds the inputs of layer L, `sums-L-N.safetensors` the sums over them.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save

from nemo_upcycle.calibration.layer import DenseLayer, embeddings
from nemo_upcycle.calibration.sums import Arrays, Sums
from nemo_upcycle.calibration.text import Prompts, Source, Tokens
from nemo_upcycle.checkpoint import DenseCheckpoint
from nemo_upcycle.checkpoint.branches import open_branches
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.files import write_whole
from nemo_upcycle.initializers.one_thread import one_thread
from nemo_upcycle.initializers.random import SAMPLE, generator

LANES = 16
"""Lanes per source. It does not depend on the processes, so that sums do not either."""


@dataclass(frozen=True)
class Lane:
    """Some sequences of a source, or the prompts of an expert.

    Attributes:
        number: The lane's number.
        source: The source's number; None for prompts.
        branch: Of several dense checkpoints, the one whose feed-forward layers are taken.
        sequences: The tokens.
        sampled: Per sequence the tokens whose inputs are kept, by number in the sequence.
    """

    number: int
    source: int | None
    branch: int
    sequences: tuple[Tokens, ...]
    sampled: tuple[npt.NDArray[np.int64], ...]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(map(len, self.sequences))


def lanes_of(
    sources: Sequence[Source], prompts: Sequence[Prompts], branches: int, sample: int, seed: int
) -> list[Lane]:
    """Cut sources and prompts into lanes.

    Args:
        sources: The text; with several branches, a source per branch.
        prompts: The prompts of each expert.
        branches: Number of dense checkpoints.
        sample: Tokens of all sources whose inputs are kept, drawn alike for all layers.
        seed: Seed of the sample.
    """
    lanes: list[Lane] = []
    kept = _sample(sources, sample, seed)
    for number, source in enumerate(sources):
        cuts = [len(source.sequences) * cut // LANES for cut in range(LANES + 1)]
        for start, stop in pairwise(cuts):
            if some := source.sequences[start:stop]:
                lanes.append(
                    Lane(
                        len(lanes), number, number % branches, some, tuple(next(kept) for _ in some)
                    )
                )
    for expert, each in enumerate(prompts):
        some = (*each.positive, *each.negative)
        lanes.append(Lane(len(lanes), None, expert % branches, some, ()))
    return lanes


def _sample(sources: Sequence[Source], size: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield, per sequence, the numbers of the tokens in the sample."""
    total = sum(source.tokens for source in sources)
    order = generator(seed, SAMPLE, 0, 0, 0).permutation(total)
    chosen = np.sort(order[:size])
    first = 0
    for source in sources:
        for sequence in source.sequences:
            stop = first + len(sequence)
            low, high = np.searchsorted(chosen, (first, stop))
            yield chosen[low:high] - first
            first = stop


@dataclass(frozen=True)
class Work:
    """What a process needs to know.

    Attributes:
        dense: The dense checkpoint; see `open_branches`.
        directory: Directory of the lanes' files.
        second_moment: See `Sums`.
    """

    dense: str
    directory: Path
    second_moment: str

    def sums(self, layer: int, lane: Lane) -> Path:
        """Return the file of a lane's sums; there once the lane is complete."""
        return self.directory / f"sums-{layer}-{lane.number}.safetensors"

    def hidden(self, layer: int, lane: Lane) -> Path:
        """Return the file of a lane's inputs of a layer."""
        return self.directory / f"hidden-{layer}-{lane.number}.f32"

    def arrays(self, layer: int, lane: Lane) -> Arrays:
        """Read a lane's sums."""
        return load_file(self.sums(layer, lane))

    def remove(self, layer: int) -> None:
        """Remove what a layer that is complete no longer needs."""
        for kind in ("sums", "hidden"):
            for path in self.directory.glob(f"{kind}-{layer}-*"):
                path.unlink()


def compute(
    work: Work,
    layer: int,
    lanes: Sequence[Lane],
    process: int = 0,
    done: Callable[[], None] = lambda: None,
) -> None:
    """Compute a layer for the lanes that are not complete, in this process, with one thread.

    The sums of a matrix product depend on the number of threads, hence one.

    Args:
        work: See `Work`.
        layer: The layer, from 0, of which the lanes' inputs are there.
        lanes: The lanes.
        process: Number of this process, which chooses among several GPUs.
        done: Called after each lane.

    Raises:
        UpcyclingError: The checkpoint cannot be read.
    """
    todo = [lane for lane in lanes if not work.sums(layer, lane).exists()]
    with one_thread(), open_branches(work.dense) as checkpoint:
        for branch, group in groupby(
            sorted(todo, key=lambda lane: lane.branch), lambda lane: lane.branch
        ):
            dense_layer = DenseLayer(checkpoint, layer, branch, _device(process))
            for lane in group:
                _compute(work, checkpoint, dense_layer, layer, lane)
                done()
            del dense_layer  # before the next one takes as much memory


def _device(process: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", process % torch.cuda.device_count())


def _compute(
    work: Work, checkpoint: DenseCheckpoint, dense: DenseLayer, layer: int, lane: Lane
) -> None:
    """Compute a lane; write the inputs of the next layer, and at last the sums."""
    sums, means = Sums(work.second_moment), []
    is_last = layer == checkpoint.architecture.num_layers - 1
    written = Path(os.devnull) if is_last else work.hidden(layer + 1, lane).with_suffix(".partial")
    with written.open("wb") as out:
        for number, hidden in enumerate(_hidden(work, checkpoint, layer, lane)):
            seen = dense.compute(hidden)
            if not seen.outputs.isfinite().all():
                raise _not_finite(checkpoint, layer)
            if lane.source is None:
                means.append(seen.inputs.double().mean(0).float().cpu())
            else:
                sums.add(seen, lane.sampled[number])
            out.write(seen.outputs.cpu().numpy().tobytes())
    if not is_last:
        os.replace(written, work.hidden(layer + 1, lane))
    arrays = sums.arrays() if lane.source is not None else {"means": torch.stack(means).numpy()}
    write_whole(work.sums(layer, lane), save(arrays))


def _hidden(
    work: Work, checkpoint: DenseCheckpoint, layer: int, lane: Lane
) -> Iterator[torch.Tensor]:
    """Yield the layer's inputs of each sequence, [tokens, hidden]."""
    if layer == 0:
        yield from (embeddings(checkpoint, sequence) for sequence in lane.sequences)
        return
    width = checkpoint.architecture.hidden_size
    with work.hidden(layer, lane).open("rb") as file:
        for sequence in lane.sequences:
            values = np.fromfile(file, np.float32, len(sequence) * width)
            yield torch.from_numpy(values.reshape(len(sequence), width))


def _not_finite(checkpoint: DenseCheckpoint, layer: int) -> UpcyclingError:
    return UpcyclingError(
        f"Layer {layer} of {checkpoint.directory} gives NaN or Inf for the text; expected finite "
        "values. Try the model in transformers: its config may be another model's."
    )

"""Calibrate a dense model: layer by layer over text, with the memory of one layer per process.

What is between two layers is in files beside the output. A killed calibration goes on from the last
complete lane. The output depends neither on the number of processes nor on interruptions.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import save

from nemo_upcycle.calibration.lanes import Lane, Work, lanes_of
from nemo_upcycle.calibration.layer import check_computable
from nemo_upcycle.calibration.processes import Processes
from nemo_upcycle.calibration.reduce import reduce
from nemo_upcycle.calibration.sums import DIAGONAL, SECOND_MOMENTS
from nemo_upcycle.calibration.text import (
    Prompts,
    Source,
    check_tokenizer,
    read_prompts,
    read_sources,
)
from nemo_upcycle.checkpoint import DenseCheckpoint
from nemo_upcycle.checkpoint.branches import open_branches
from nemo_upcycle.checkpoint.described import check_whole
from nemo_upcycle.checkpoint.fingerprint import weights_fingerprint
from nemo_upcycle.checkpoint.safetensors_header import header_of, read_header
from nemo_upcycle.checkpoint.tokenizer_directory import named_tokenizer
from nemo_upcycle.data.encoder import load_encoder
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.files import check_writable, output_directory, write_whole
from nemo_upcycle.initializers.statistics import FORMAT, MANIFEST, read_manifest
from nemo_upcycle.progress import Progress, no_progress, size
from nemo_upcycle.work_directory import work_directory

SEQUENCE_LENGTH = 2048
"""Tokens per sequence, if the model's context is not shorter."""


@dataclass(frozen=True)
class Calibration:
    """Inputs and output of a calibration.

    Attributes:
        dense: The dense checkpoint, a Hugging Face directory; or several, see `open_branches`.
        texts: Sources of text; with several dense checkpoints, one for each of them.
        out: The file to write.
        tokens: Tokens in all.
        sequence_length: Tokens per sequence; None means `SEQUENCE_LENGTH`.
        clusters: Clusters of inputs per layer, usually as many as copies of the layer.
        cluster_rank: Rank of the clusters' weights, which `cluster_svd` needs; 0 for none.
        sample: Tokens whose inputs are clustered, at most.
        second_moment: Of the inputs: `none`, `diagonal` or `full`.
        prompts: File of prompts; see `read_prompts`.
        tokenizer: The tokenizer's directory; None means that of the dense checkpoint.
        text_key: Field of a document's record with the text.
        seed: Seed of the sample and of the clusters.
    """

    dense: str
    texts: tuple[str, ...]
    out: Path
    tokens: int = 1_000_000
    sequence_length: int | None = None
    clusters: int = 8
    cluster_rank: int = 0
    sample: int = 16_384
    second_moment: str = DIAGONAL
    prompts: Path | None = None
    tokenizer: str | None = None
    text_key: str = "text"
    seed: int = 1234

    @property
    def work(self) -> Path:
        """The directory of the files between layers."""
        return self.out.with_name(f".{self.out.name}.layers")


def calibrate(
    calibration: Calibration, processes: int = 1, progress: Progress = no_progress
) -> dict[str, Any]:
    """Write the statistics of a dense model, or continue an interrupted calibration.

    Args:
        calibration: Inputs and output.
        processes: Number of processes, each with one thread and the memory of a layer in fp32.
        progress: Called with tokens done, tokens in all layers, and the layer.

    Returns:
        The manifest; immediately if the statistics are already there.

    Raises:
        UpcyclingError: The checkpoint cannot be read or computed, the text cannot be read or is too
            short, the disk has too little room, or another calibration's files are there.
    """
    _check(calibration)
    checkpoint = open_branches(calibration.dense)
    check_whole(checkpoint)
    _check_texts(calibration, len(checkpoint.branches))
    _check_rank(calibration.cluster_rank, checkpoint.architecture.hidden_size)
    check_computable(checkpoint)
    sources, prompts = _read(calibration, checkpoint)
    manifest = _manifest(calibration, checkpoint, sources, prompts)
    checkpoint.close()
    if calibration.out.exists():
        if read_manifest(calibration.out) == manifest:
            return manifest
        raise UpcyclingError(
            f"{calibration.out} holds other statistics. Give another name, or remove it."
        )
    check_writable(calibration.out.parent)
    lanes = lanes_of(
        sources, prompts, len(checkpoint.branches), calibration.sample, calibration.seed
    )
    with (
        output_directory(calibration.out.parent),
        work_directory(
            calibration.work,
            manifest,
            "layers",
            "another checkpoint or text, or other options",
        ),
    ):
        _check_room(calibration, checkpoint, lanes)
        _compute_layers(calibration, checkpoint, sources, prompts, lanes, processes, progress)
        layers = [_layer_file(calibration, n) for n in range(checkpoint.architecture.num_layers)]
        _put_together(calibration, manifest, layers)
    shutil.rmtree(calibration.work, ignore_errors=True)
    return manifest


# --- Inputs --------------------------------------------------------------------------------------


def _check(calibration: Calibration) -> None:
    if calibration.second_moment not in SECOND_MOMENTS:
        raise UpcyclingError(
            f"second moment is {calibration.second_moment!r}; expected one of: "
            f"{', '.join(SECOND_MOMENTS)}."
        )
    length = calibration.sequence_length
    for name, value in (
        ("tokens", calibration.tokens),
        ("sequence length", 1 if length is None else length),
        ("clusters", calibration.clusters),
        ("sample", calibration.sample),
    ):
        if value < 1:
            raise UpcyclingError(f"{name} is {value}; expected 1 or more.")


def _check_texts(calibration: Calibration, branches: int) -> None:
    texts = len(calibration.texts)
    if not texts or (branches > 1 and texts != branches):
        expected = "one or more" if branches == 1 else f"{branches}, one per dense checkpoint"
        raise UpcyclingError(f"There are {texts} sources of text; expected {expected} (--text).")


def _check_rank(rank: int, most: int) -> None:
    if not 0 <= rank <= most:
        raise UpcyclingError(
            f"cluster rank is {rank}; expected 0 for none, or up to the hidden size, {most}."
        )


def _read(
    calibration: Calibration, checkpoint: DenseCheckpoint
) -> tuple[list[Source], list[Prompts]]:
    arch = checkpoint.architecture
    directory = named_tokenizer(calibration.tokenizer or checkpoint.branches[0].directory)
    encoder = load_encoder(directory)
    check_tokenizer(calibration.texts, directory)
    length = calibration.sequence_length or min(SEQUENCE_LENGTH, arch.max_position_embeddings)
    sources = read_sources(
        calibration.texts, calibration.tokens, encoder, length, calibration.text_key
    )
    count = sum(source.tokens for source in sources)
    if min(count, calibration.sample) < calibration.clusters:
        raise UpcyclingError(
            f"There are {min(count, calibration.sample)} tokens to cluster; expected at least "
            f"{calibration.clusters}, the number of clusters. Give more text or a larger sample."
        )
    return sources, read_prompts(calibration.prompts, encoder) if calibration.prompts else []


def _manifest(
    calibration: Calibration,
    checkpoint: DenseCheckpoint,
    sources: Sequence[Source],
    prompts: Sequence[Prompts],
) -> dict[str, Any]:
    """Return everything that determines the statistics."""
    arch = checkpoint.architecture
    ranks = {"cluster_rank": calibration.cluster_rank} if calibration.cluster_rank else {}
    return ranks | {
        "format": FORMAT,
        "fingerprint": weights_fingerprint(checkpoint),
        "branches": len(checkpoint.branches),
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "texts": [source.described for source in sources],
        "sequence_length": max(len(source.sequences[0]) for source in sources),
        "prompts": [each.digest for each in prompts],
        "clusters": calibration.clusters,
        "sample": calibration.sample,
        "second_moment": calibration.second_moment,
        "seed": calibration.seed,
    }


def _check_room(
    calibration: Calibration, checkpoint: DenseCheckpoint, lanes: Sequence[Lane]
) -> None:
    """Check that the inputs of a layer have room on the disk, twice for the lanes under way."""
    tokens = sum(lane.tokens for lane in lanes) + max(lane.tokens for lane in lanes)
    needed = 4 * tokens * checkpoint.architecture.hidden_size
    there = sum(path.stat().st_size for path in calibration.work.glob("hidden-*"))
    free = shutil.disk_usage(calibration.work).free
    if needed - there > free:
        raise UpcyclingError(
            f"{calibration.work} needs {size(needed - there)} for what is between two layers, and "
            f"the disk has {size(free)}. Give fewer --tokens, or an --out on another disk."
        )


# --- Layers --------------------------------------------------------------------------------------


def _layer_file(calibration: Calibration, layer: int) -> Path:
    return calibration.work / f"layer-{layer}.safetensors"


def _compute_layers(
    calibration: Calibration,
    checkpoint: DenseCheckpoint,
    sources: Sequence[Source],
    prompts: Sequence[Prompts],
    lanes: Sequence[Lane],
    processes: int,
    progress: Progress,
) -> None:
    work = Work(calibration.dense, calibration.work, calibration.second_moment)
    layers = checkpoint.architecture.num_layers
    per_layer = sum(lane.tokens for lane in lanes)
    with Processes(min(processes, len(lanes))) as run:
        for layer in range(layers):
            file = _layer_file(calibration, layer)
            if not file.exists():

                def show(done: int, layer: int = layer) -> None:
                    note = f"layer {layer + 1} of {layers}"
                    progress(layer * per_layer + done, layers * per_layer, note)

                run.compute(work, layer, lanes, show)
                arrays = reduce(
                    work,
                    sources,
                    prompts,
                    lanes,
                    layer,
                    calibration.clusters,
                    calibration.cluster_rank,
                    calibration.seed,
                )
                write_whole(file, save({f"layers.{layer}.{k}": v for k, v in arrays.items()}))
            work.remove(layer)


# --- The file ------------------------------------------------------------------------------------


def _put_together(
    calibration: Calibration, manifest: dict[str, Any], layers: Sequence[Path]
) -> None:
    """Write all layers as one safetensors file, a tensor at a time."""
    infos = {  # in the order of their bytes
        name: info
        for layer in layers
        for name, (info, _) in sorted(
            read_header(layer.parent, layer.name).items(), key=lambda entry: entry[1][1].start
        )
    }
    new = calibration.work / "new.statistics"
    with new.open("wb") as out:
        out.write(header_of(infos, {MANIFEST: json.dumps(manifest, sort_keys=True)}))
        for layer in layers:
            with layer.open("rb") as file:
                file.seek(8 + int.from_bytes(file.read(8), "little"))
                shutil.copyfileobj(file, out)
    os.replace(new, calibration.out)

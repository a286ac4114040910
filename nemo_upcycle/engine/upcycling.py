"""Upcycling on all ranks of a job: fill the model, share errors, report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_upcycle.checkpoint import DenseCheckpoint
from nemo_upcycle.checkpoint.branches import open_branches
from nemo_upcycle.checkpoint.described import check_whole
from nemo_upcycle.checkpoint.fingerprint import fingerprint
from nemo_upcycle.checkpoint.kept import kept_of
from nemo_upcycle.config import Exactness, UpcyclingConfig
from nemo_upcycle.engine.agreement import check_agreement, exactness_of
from nemo_upcycle.engine.initializers import check_initializers
from nemo_upcycle.engine.load import LoadReport, check_all_used, fill
from nemo_upcycle.engine.ranks import Ranks, check_same
from nemo_upcycle.families.fields import upcycling_in
from nemo_upcycle.progress import progress, size


@dataclass(frozen=True)
class Report:
    """What a job has done.

    Attributes:
        dense_checkpoint: The source of the weights.
        upcycling: What the feed-forward layers have become.
        ranks: The reports of all ranks.
        exactness: Whether the model computes the dense model's function, and why.
    """

    dense_checkpoint: str
    upcycling: UpcyclingConfig
    ranks: tuple[LoadReport, ...]
    exactness: Exactness

    def __str__(self) -> str:
        tensors = frozenset().union(*(rank.tensors for rank in self.ranks))
        most = max(rank.bytes_read for rank in self.ranks)
        peak = max(rank.peak_resident_bytes for rank in self.ranks)
        lines = {
            "tensors mapped": f"{len(tensors)} dense → {sum(r.shards for r in self.ranks)} shards",
            "bytes read": f"{size(sum(rank.bytes_read for rank in self.ranks))} in total, "
            f"at most {size(most)} per rank",
            "time": f"{max(rank.seconds for rank in self.ranks):.2f} s",
            "peak memory": f"{size(peak)} resident per rank",
            "step 0": str(self.exactness),
        }
        head = f"{self.dense_checkpoint} → {self.upcycling.label} on {len(self.ranks)} rank(s)"
        return "\n".join([head, *(f"  {name:<17} {text}" for name, text in lines.items())])


@dataclass(frozen=True)
class Prepared:
    """A dense checkpoint, opened by headers, with the upcycling.

    Attributes:
        name: The checkpoint's name in the command.
        checkpoint: The checkpoint.
        fingerprint: Fingerprint of the weights; see `checkpoint.fingerprint`.
        kept: Settings of the configs that training keeps; see `checkpoint.kept`.
        upcycling: What the dense feed-forward layers become.
    """

    name: str
    checkpoint: DenseCheckpoint
    fingerprint: str
    kept: Mapping[str, Any] | None
    upcycling: UpcyclingConfig

    def check_model(self, config: Any, **others: Any) -> None:
        """Check that a model matches the checkpoint, by headers and configs alone.

        Args:
            config: The model's config, with Megatron's and NeMo's field names.
            others: Further arguments of `check_agreement`.

        Raises:
            UpcyclingError: The checkpoint's tensors contradict its config, or the model differs.
        """
        check_whole(self.checkpoint)
        check_agreement(config, self.checkpoint.architecture, **others)


def prepare(dense_checkpoint: str, upcycling: UpcyclingConfig) -> Prepared:
    """Open a dense checkpoint, without reading more than headers and a few values.

    Args:
        dense_checkpoint: Directory in the format of Hugging Face, NeMo 2 or Megatron-LM, or a
            model's name in the local Hugging Face cache. Several, separated by semicolons, give
            experts in turn, and all other weights are averaged (Branch-Train-MiX).
        upcycling: What the dense feed-forward layers become.

    Raises:
        UpcyclingError: The checkpoint cannot be read or cannot be upcycled, or an initializer's
            statistics are of another checkpoint.
    """
    checkpoint = open_branches(dense_checkpoint)
    check_initializers(upcycling, checkpoint)
    return Prepared(
        dense_checkpoint,
        checkpoint,
        fingerprint(checkpoint),
        kept_of(checkpoint.branches[0]),
        upcycling,
    )


def fill_all(
    prepared: Prepared,
    modules: Sequence[torch.nn.Module],
    config: Any,
    ranks: Ranks,
    read_once: bool = False,
) -> Report:
    """Fill the model on all ranks; every rank must call this.

    Args:
        prepared: The same dense checkpoint on every rank.
        modules: This rank's Megatron-Core GPT models, one per virtual pipeline stage.
        config: The model's config.
        ranks: The job's ranks.
        read_once: Read each slice once per job and broadcast the slice to all ranks that hold it.

    Raises:
        UpcyclingError: On all ranks, if a rank has failed or is lost, or if a part of the
            checkpoint was not used.
    """
    dense = prepared.checkpoint
    with progress("[upcycle]", active=ranks.rank == 0, in_bytes=True) as show:
        report = ranks.on_all(lambda: fill(modules, dense, prepared.upcycling, show, read_once))
    reports = ranks.gather(report)
    check_all_used(dense, reports)
    exactness = exactness_of(config, prepared.upcycling, dense.architecture, len(dense.branches))
    return Report(prepared.name, prepared.upcycling, tuple(reports), exactness)


def upcycle(
    modules: Sequence[torch.nn.Module],
    config: Any,
    dense_checkpoint: str,
    upcycling: UpcyclingConfig | None = None,
    ranks: Ranks | None = None,
    read_once: bool = False,
) -> Report:
    """Fill a Megatron-Core model from a dense checkpoint; every rank of the job must call this.

    Each rank reads only the slices that fill its own shards, and writes the slices in place; no
    rank holds the dense model. An error on any rank is raised on all ranks. An optimizer with fp32
    copies of the parameters must reload the parameters afterwards (Megatron's
    `reload_model_params()`).

    Args:
        modules: This rank's Megatron-Core GPT models, one per virtual pipeline stage.
        config: The models' config, with Megatron's and NeMo's field names, such as
            `UpcycledGPTConfig`.
        dense_checkpoint: A source for `prepare`.
        upcycling: What the feed-forward layers become; None copies the layers into the experts
            of the config.
        ranks: The job's ranks; None makes a new group.
        read_once: Read each slice once per job and broadcast the slice to all ranks that hold it,
            for file systems that are slower than the network.

    Returns:
        The report of all ranks, on every rank; `str()` gives the text that a run prints.

    Raises:
        UpcyclingError: The checkpoint is damaged or does not match the model, or a rank failed or
            was lost. Nothing is written then, unless weights are not finite or a rank is lost.

    Source: online upcycling, arXiv 2412.09952 §3.
    """
    ranks = ranks or Ranks()

    def prepared_here() -> Prepared:
        prepared = prepare(dense_checkpoint, upcycling or upcycling_in(config))
        prepared.check_model(config)
        return prepared

    prepared = ranks.on_all(prepared_here)
    check_same("dense checkpoints", ranks.gather(prepared.fingerprint))
    return fill_all(prepared, modules, config, ranks, read_once)

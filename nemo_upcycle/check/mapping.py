"""The checks of one mapping, on one rank."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_upcycle.check import models
from nemo_upcycle.check.findings import MAPPING_CHECKS, Finding, Seen, agreed, near
from nemo_upcycle.check.process_groups import (
    device,
    groups_of_rank,
    make_groups,
    patient,
    planned_groups,
)
from nemo_upcycle.check.saved import differing_after_load, exported_digest, save
from nemo_upcycle.check.subject import STEP0_ROWS, Subject, build, fill_all, step, trainer
from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.errors import listing


@dataclass(frozen=True)
class Reference:
    """What every mapping has to show.

    Attributes:
        logits: The dense model's, computed by transformers in fp32, [rows, length, vocabulary].
        digest: Of the weights that the dense model becomes without Megatron, with experts that
            differ; None if no architecture of transformers computes this MoE.
        loss: Of one step on one rank, with experts that differ.
        norm: Norm of all gradients of this step.
    """

    logits: torch.Tensor
    digest: str | None
    loss: float
    norm: float


def one_rank(subject: Subject, rows: int) -> tuple[float, float]:
    """Return the loss and the gradient norm of one step, in a job of this rank alone."""
    make_groups(ParallelFolding())
    chunks = build(subject, ParallelFolding())
    fill_all(chunks, subject, patient(), subject.varied)
    loss, norm = loss_and_norm(chunks, subject, rows)
    assert loss is not None
    return loss, norm


def loss_and_norm(chunks: models.Chunks, subject: Subject, rows: int) -> tuple[float | None, float]:
    """Run one step; see `step`. The norm is the one that the optimizer clips by."""
    models.make_experts_differ(chunks)
    wrapped, optimizer = trainer(chunks, subject, lr=0.0)
    loss = step(wrapped, optimizer, subject.ids(rows))
    optimizer.prepare_grads()
    return loss, float(optimizer.get_grad_norm())


class MappingCheck:
    """The checks of a mapping; run on every rank of a job, once.

    Args:
        subject: The model.
        folding: The mapping.
        reference: What the mapping has to show.
        rows: Rows of the global batch.
        directory: Directory for checkpoints, seen by all ranks.
        elsewhere: Checkpoint that another mapping has saved; None for the first mapping.
    """

    def __init__(
        self,
        subject: Subject,
        folding: ParallelFolding,
        reference: Reference,
        rows: int,
        directory: Path,
        elsewhere: Path | None,
    ) -> None:
        self.subject, self.folding, self.reference = subject, folding, reference
        self.rows, self.directory, self.elsewhere = rows, directory, elsewhere
        self.ranks, self._results = patient(), patient()
        self._chunks: models.Chunks = []
        self._stepped: tuple[float | None, float] | None = None

    def run(self, show: Callable[[Finding], None]) -> Iterator[Finding]:
        """Yield the findings, each shown at once; a rank's error ends the mapping's checks."""
        work: dict[str, Callable[[], Seen]] = {
            "groups": self._groups,
            "step 0": self._step0,
            "export": self._export,
            "load elsewhere": self._load,
            "loss": self._loss,
            "gradient norm": self._norm,
        }
        for check in MAPPING_CHECKS:
            finding = agreed(check, str(self.folding), work[check], self._results)
            show(finding)
            yield finding
            if finding.is_error:
                return

    def _groups(self) -> Seen:
        make_groups(self.folding)
        found, planned = groups_of_rank(), planned_groups(self.folding)
        wrong = [kind for kind in planned if found.get(kind) != planned[kind]]
        said, expected = (
            "; ".join(f"{kind} {groups.get(kind)}" for kind in wrong) for groups in (found, planned)
        )
        return Seen(
            not wrong, said or "the same", expected or "the groups of `nemo-upcycle groups`"
        )

    def _step0(self) -> Seen:
        self._chunks = self.ranks.on_all(lambda: build(self.subject, self.folding))
        fill_all(self._chunks, self.subject, self.ranks)
        found = models.logits(self._chunks, self.subject.ids(STEP0_ROWS)[:, :-1])
        if found is None:
            return Seen(True, "nothing: not the last stage", "nothing")
        positions, logits = found
        vocabulary = self.reference.logits.shape[-1]
        expected = self.reference.logits.to(device())[:, positions]
        largest = float(expected.abs().max())
        distance = float((logits[..., :vocabulary].float() - expected).abs().max()) / largest
        tolerance = self.subject.tolerance.logits
        return Seen(
            distance <= tolerance,
            f"logits {distance:.1e} of the largest apart",
            f"the dense model's logits, at most {tolerance:.0e} of the largest apart",
            distance,
        )

    def _export(self) -> Seen:
        fill_all(self._chunks, self.subject, self.ranks, self.subject.varied)
        save(self._chunks, self.subject, self.folding, self.directory)
        if self.ranks.rank:
            return Seen(True, "nothing: rank 0 exports", "nothing")
        if self.reference.digest is None:
            return Seen(True, "saved; transformers computes no such MoE", "nothing to export")
        directory = self.directory / "hf"
        found = exported_digest(self.directory, directory)
        shutil.rmtree(directory)
        expected = self.reference.digest
        return Seen(found == expected, f"digest {found}", f"digest {expected} of `upcycle`'s files")

    def _load(self) -> Seen:
        if self.elsewhere is None:
            return Seen(True, "nothing: no other mapping has saved", "nothing")
        wrong = differing_after_load(self._chunks, self.elsewhere)
        found = (
            f"{len(wrong)} parameters that differ: {listing(wrong)}" if wrong else "the same bits"
        )
        return Seen(not wrong, found, f"the bits that {self.elsewhere.name} has saved", len(wrong))

    def _loss(self) -> Seen:
        self._stepped = loss_and_norm(self._chunks, self.subject, self.rows)
        loss = self._stepped[0]
        if loss is None:
            return Seen(True, "nothing: not the last stage", "nothing", -1.0)
        return near(loss, self.reference.loss, self.subject.tolerance.loss)

    def _norm(self) -> Seen:
        assert self._stepped is not None
        return near(self._stepped[1], self.reference.norm, self.subject.tolerance.norm)

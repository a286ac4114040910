"""A check of all ranks, from the dense model to the results."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.check import bandwidth
from nemo_upcycle.check.bandwidth import known_hardware
from nemo_upcycle.check.dense import write_first_layers, write_tiny
from nemo_upcycle.check.findings import Finding, Outcome
from nemo_upcycle.check.mapping import MappingCheck, Reference, one_rank
from nemo_upcycle.check.mappings import mappings
from nemo_upcycle.check.process_groups import job, patient, prepare_process
from nemo_upcycle.check.restart import check_restart
from nemo_upcycle.check.saved import digest
from nemo_upcycle.check.subject import STEP0_ROWS, Subject
from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.engine.launch import is_first_rank
from nemo_upcycle.engine.ranks import Ranks
from nemo_upcycle.engine.upcycled_directory import upcycle_directory
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.evaluation.transformers_model import transformers_model
from nemo_upcycle.families.model import upcycled_model
from nemo_upcycle.families.moe import moe_family_of
from nemo_upcycle.files import write_whole

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}

Show = Callable[[Finding], None]


@dataclass(frozen=True)
class Options:
    """What is checked.

    Attributes:
        out: Directory for files, seen by all ranks.
        dense: The user's dense model; None for the tiny one.
        layers: Layers of the user's model.
        dtype: dtype of the parameters.
        hardware: Name or file of the planner's hardware; None for the device's.
    """

    out: Path
    dense: str | None = None
    layers: int = 4
    dtype: torch.dtype = torch.float32
    hardware: str | None = None


class Check:
    """A check on one rank; every rank must run one.

    Args:
        options: What is checked, the same on all ranks.
        show: Called with each finding.
    """

    def __init__(self, options: Options, show: Show) -> None:
        self.options, self._show = options, show
        self.work = options.out / "work"
        self.subject = Subject(self.work / "dense", options.dtype)

    def run(self) -> Outcome:
        """Run all checks; return the same outcome on every rank."""
        prepare_process()
        with job():
            ranks = patient()
            ranks.on_all(lambda: self._write(ranks.rank))
            ranks.on_all(lambda: self.subject.prepared)
            size = ranks.size
            outcome = self._outcome(ranks)
        rows = size * -(-STEP0_ROWS // size)
        with job(alone=True):
            loss, norm = one_rank(self.subject, rows)
        kept: dict[str, Any] = torch.load(self._reference, weights_only=True)
        reference = Reference(**kept, loss=loss, norm=norm)
        chosen = mappings(self.subject.architecture, self.subject.upcycling, outcome.ranks)
        self._mappings(outcome, chosen, reference, rows)
        self._restart(outcome, chosen)
        self._bandwidths(outcome)
        if is_first_rank():
            write_whole(self.options.out / "check.json", json.dumps(outcome.to_json(), indent=2))
            shutil.rmtree(self.work)
        return outcome

    @property
    def _reference(self) -> Path:
        return self.work / "reference.pt"

    def _write(self, rank: int) -> None:
        """Write the dense model and what it has to become, on rank 0."""
        if rank:
            return
        shutil.rmtree(self.work, ignore_errors=True)
        dense = self.subject.dense
        if self.options.dense is None:
            write_tiny(dense)
        else:
            write_first_layers(self.options.dense, self.options.layers, dense)
        model = transformers_model(dense, torch.float32)
        with torch.no_grad():
            logits = model(self.subject.ids(STEP0_ROWS)[:, :-1].cpu()).logits
        torch.save({"logits": logits, "digest": self._digest()}, self._reference)

    def _digest(self) -> str | None:
        """Return the digest of the exported MoE; None if transformers computes no such MoE."""
        directory, upcycling = self.work / "upcycled", self.subject.varied
        try:
            moe_family_of(upcycled_model(self.subject.architecture, upcycling))
        except UpcyclingError:
            return None
        dtype = _NAMES[self.subject.dtype]
        upcycle_directory(str(self.subject.dense), directory, upcycling, dtype)
        found = digest(directory)
        shutil.rmtree(directory)
        return found

    def _outcome(self, ranks: Ranks) -> Outcome:
        on_gpu = torch.cuda.is_available()
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return Outcome(
            subject=self._subject_name(),
            device=torch.cuda.get_device_name() if on_gpu else "CPU",
            ranks=ranks.size,
            nodes=ranks.size // per_node,
        )

    def _subject_name(self) -> str:
        arch = self.subject.architecture
        what = "a tiny Llama" if self.options.dense is None else self.options.dense
        dtype = str(self.subject.dtype).removeprefix("torch.")
        return f"{what}, {arch.num_layers} layers, {self.subject.upcycling.label}, {dtype}"

    def _add(self, outcome: Outcome, finding: Finding) -> None:
        outcome.findings.append(finding)
        self._show(finding)

    def _mappings(
        self,
        outcome: Outcome,
        chosen: list[ParallelFolding],
        reference: Reference,
        rows: int,
    ) -> None:
        saved: Path | None = None
        for folding in chosen:
            directory = self.work / _file_name(folding)
            with job():
                check = MappingCheck(self.subject, folding, reference, rows, directory, saved)
                found = list(check.run(self._show))
            outcome.findings.extend(found)
            if any(each.check == "export" and not each.is_error for each in found):
                if saved is not None and is_first_rank():
                    shutil.rmtree(saved)
                saved = directory

    def _restart(self, outcome: Outcome, chosen: list[ParallelFolding]) -> None:
        """Kill and resume a training under the mapping that combines most."""
        richest = max(reversed(chosen), key=_kinds)
        self._add(outcome, check_restart(self.subject, richest, self.work))

    def _bandwidths(self, outcome: Outcome) -> None:
        """Measure, judge, and write what the planner can read."""
        known = known_hardware(self.options.hardware)
        with job():
            outcome.bandwidths = bandwidth.measure(known, patient())
        for finding in bandwidth.findings(outcome.bandwidths):
            self._add(outcome, finding)
        if known is None or not outcome.bandwidths:
            return
        path = self.options.out / "hardware.yaml"
        outcome.hardware_file = str(path)
        if is_first_rank():
            per_node = outcome.ranks // outcome.nodes
            bandwidth.write_hardware(known, outcome.bandwidths, per_node, path)


def _kinds(folding: ParallelFolding) -> int:
    """Return how many kinds of parallelism a mapping combines."""
    return sum(1 for size in folding.parallel_sizes.values() if size and size > 1)


def _file_name(folding: ParallelFolding) -> str:
    return str(folding).replace(" · ", "-").replace(" ", "-")

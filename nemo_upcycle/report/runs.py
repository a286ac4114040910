"""A run's directory as data: what it began from, what it has logged, the load of its experts."""

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_upcycle.checkpoint.beside import UPCYCLED_FROM, record_in
from nemo_upcycle.checkpoint.kept import recorded_in
from nemo_upcycle.checkpoint.megatron import find_layout
from nemo_upcycle.checkpoint.run_directory import checkpoints_of, is_complete
from nemo_upcycle.engine.load_record import LOADS, Loads, read_loads
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.evaluation.events import event_files, read_scalars

BATCH_SIZE, SEQ_LENGTH = "global_batch_size", "data.seq_length"


@dataclass(frozen=True)
class Run:
    """What the directory of a run says.

    Attributes:
        directory: The directory.
        name: The directory's name.
        checkpoint: Name of the checkpoint that holds the record; None if another file does.
        record: The fields of `engine.provenance.Origin`; empty if nothing is recorded.
        scalars: Logged numbers by tag and step.
        loads: The load of the experts at each measured step.
    """

    directory: Path
    name: str
    checkpoint: str | None
    record: Mapping[str, Any]
    scalars: Mapping[str, Mapping[int, float]]
    loads: Sequence[Loads]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The training's settings, by the names of the command line."""
        return _mapping(self.record.get("settings"))

    @property
    def upcycling(self) -> Mapping[str, Any]:
        """The fields of `UpcyclingConfig`."""
        return _mapping(self.record.get("upcycling"))

    @property
    def experts(self) -> int | None:
        """Experts per MoE layer; None if the model is dense or nothing says so."""
        experts = self.upcycling.get("num_moe_experts")
        return experts if isinstance(experts, int) else None

    @cached_property
    def tokens_after(self) -> Callable[[float], float] | None:
        """The number of training tokens after so many steps; None if the run does not say."""
        length = self.settings.get(SEQ_LENGTH)
        sizes = sorted(self.scalars.get(BATCH_SIZE, {}).items())
        if not isinstance(length, int) or not sizes:
            return None
        steps, tokens, each = [0], [0.0], 0.0
        for step, size in sizes:
            each = size * length
            tokens.append(tokens[-1] + (step + 1 - steps[-1]) * each)
            steps.append(step + 1)

        def after(done: float) -> float:
            index = bisect_left(steps, done)
            if index == len(steps):
                return tokens[-1] + (done - steps[-1]) * each
            if index == 0:
                return 0.0
            share = (done - steps[index - 1]) / (steps[index] - steps[index - 1])
            return tokens[index - 1] + share * (tokens[index] - tokens[index - 1])

        return after


def read_run(directory: Path) -> Run:
    """Read what is in the directory of a run.

    Args:
        directory: The directory of a NeMo run, or where Megatron-LM or Bridge saves checkpoints.
            Event files are below the directory, or in `tb_logs/NAME` beside it, where NeMo puts
            them.

    Raises:
        UpcyclingError: This is no directory of a run, or a file in it is damaged.
    """
    if not directory.is_dir():
        raise UpcyclingError(
            f"{directory} is no directory; expected the directory of a run, such as demo/e8t2."
        )
    # A path such as `.` has no name of its own.
    name = directory.resolve().name
    checkpoint, record = _record(directory)
    files = event_files(directory) or event_files(directory.resolve().parent / "tb_logs" / name)
    loads = read_loads(directory / LOADS)
    if not (record or files or loads):
        raise UpcyclingError(
            f"{directory} has no complete checkpoint, no {UPCYCLED_FROM}, no TensorBoard event "
            "files (*tfevents*) and no record of experts' load; expected the directory of a run, "
            "such as demo/e8t2."
        )
    scalars = read_scalars(files) if files else {}
    return Run(directory, name, checkpoint, record or {}, scalars, loads)


def _record(directory: Path) -> tuple[str | None, dict[str, Any] | None]:
    """Return the last complete checkpoint's name and the run's record, None where missing."""
    beside = record_in(directory)
    if beside is not None:
        if not isinstance(beside, dict):
            raise UpcyclingError(
                f"{directory / UPCYCLED_FROM} holds a {type(beside).__name__}; expected a JSON "
                "object."
            )
        return None, beside
    for checkpoint in reversed(checkpoints_of(directory)):
        layout = find_layout(checkpoint) if is_complete(checkpoint) else None
        if layout is not None:
            found = recorded_in(layout.weights)
            # Only plain data: a checkpoint may hold whatever was pickled.
            plain = None if found is None else json.loads(json.dumps(found, default=str))
            return checkpoint.name, plain
    return None, None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}

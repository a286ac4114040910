"""Writes Hugging Face directories during training."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from nemo.lightning import io
from nemo.utils import AppState
from nemo.utils.get_rank import is_global_rank_zero

from nemo_upcycle.checkpoint.run_directory import age, checkpoints_of, is_complete
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.nemo.provenance import say
from nemo_upcycle.trained.background import Exports

DIRECTORY = "hf"
"""Directory of the exports, in the run's directory."""


class ExportCallback(pl.Callback, io.IOMixin):
    """Export every n-th checkpoint and the last to `hf/step=N` in the run's directory.

    The export runs in a process of its own, of low priority and without a GPU, on the first rank's
    machine; the steps go on. The run waits for it only at its end. A failed export is one warning.
    Exports that a stop of the run interrupts are made at the next start.

    Args:
        every_n: Checkpoints from one export to the next, counted by steps.
    """

    def __init__(self, every_n: int = 1) -> None:
        if every_n < 1:
            raise UpcyclingError(f"export_every_n is {every_n}; expected 1 or more.")
        self.every_n = every_n
        self._exports: Exports | None = None
        self._step = -1
        self._looked_after: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find what an earlier start has not exported.

        Raises:
            UpcyclingError: The names of the checkpoints have no step.
        """
        self._exports, self._step, self._looked_after = None, -1, None
        checkpoint = trainer.checkpoint_callback
        if stage != "fit" or checkpoint is None:
            return
        if "{step}" not in str(checkpoint.filename):
            raise UpcyclingError(
                f"log.ckpt.filename is {checkpoint.filename!r}; with export_every_n it needs "
                "{step}, which names the exports."
            )
        if is_global_rank_zero() and AppState().log_dir:
            self._exports = Exports(Path(AppState().log_dir) / DIRECTORY)
            self._exports.resume()
            if not trainer.ckpt_path:
                self._step = self._newest(trainer)[0]  # not of this run

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Begin to export the checkpoint that was completed since the last step."""
        self._look(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Export the last checkpoint, and wait."""
        self._look(trainer, wait=True)

    def _look(self, trainer: pl.Trainer, wait: bool = False) -> None:
        if self._exports is None:
            return
        try:
            self._add_newest(trainer)
            remarks = self._exports.poll(wait)
        except OSError as error:  # such as a full disk; the other ranks know nothing of it
            remarks = [f"warning: nothing is exported, the run goes on: {error}"]
        for remark in remarks:
            say(f"[export] {remark}")

    def _add_newest(self, trainer: pl.Trainer) -> None:
        saved = trainer.checkpoint_callback._last_global_step_saved
        if saved == self._looked_after:  # no checkpoint has been begun since
            return
        step, checkpoint = self._newest(trainer)
        if checkpoint is not None and step > self._step:
            self._step, self._looked_after = step, saved
            self._add(trainer, step, checkpoint)

    def _add(self, trainer: pl.Trainer, step: int, checkpoint: Path) -> None:
        assert self._exports is not None
        resumed = trainer.ckpt_path and Path(trainer.ckpt_path).parent.name == checkpoint.name
        there = (self._exports.directory / f"step={step}").exists()
        if self._due(trainer, step + 1) and not (resumed and there):
            self._exports.add(f"step={step}", checkpoint)

    def _newest(self, trainer: pl.Trainer) -> tuple[int, Path | None]:
        directory = Path(trainer.checkpoint_callback.dirpath)
        if not directory.is_dir():
            return -1, None
        complete = [path for path in checkpoints_of(directory) if is_complete(path)]
        return (age(complete[-1])[0], complete[-1]) if complete else (-1, None)

    def _due(self, trainer: pl.Trainer, steps: int) -> bool:
        """Return whether the checkpoint after a number of steps is to be exported."""
        interval = (trainer.checkpoint_callback._every_n_train_steps or 1) * self.every_n
        return steps % interval == 0 or steps == trainer.max_steps

"""Save and stop when a scheduler preempts the job, a terminal closes, or a user presses Ctrl-C."""

import os
import signal
import time
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning import io
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO
from nemo.utils.get_rank import is_global_rank_zero

from nemo_upcycle.files import leave_terminal

NAMES: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
"""Names of the handled signals; SIGHUP, sent when a terminal closes, is handled as SIGTERM."""

SECONDS_OF_ONE_KEY = 1.0
"""Time within which repeated signals count as one key press, in seconds.

A terminal signals all ranks and torchrun, and torchrun then signals the ranks again.
"""


class PreemptionCallback(pl.Callback, io.IOMixin):
    """On SIGTERM, SIGHUP or Ctrl-C, save at the end of the step and exit; the run can be resumed.

    The exit code is 143, or 130 after Ctrl-C. A second Ctrl-C ends the run immediately. So does a
    Ctrl-C before training has begun, when there is nothing to save.

    Slurm sends SIGTERM to any of the ranks: before preemption, or before a time limit with
    `--signal=TERM@SECONDS`. NeMo's own callback checks only the first rank, needs CUDA, and exits
    with 0, so that a dependent job would continue with an incomplete model. Lightning stops at
    Ctrl-C without saving.
    """

    def __init__(self) -> None:
        self._received, self._at = 0, 0.0
        self._training = False
        self._previous: dict[int, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Handle Ctrl-C; SIGTERM still has the default action."""
        self._received, self._training = 0, False
        self._listen(signal.SIGINT)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Handle SIGTERM and SIGHUP."""
        self._training = True
        self._listen(signal.SIGTERM)
        self._listen(signal.SIGHUP)

    def _listen(self, number: int) -> None:
        # A shell makes background jobs ignore Ctrl-C; nohup makes them ignore SIGHUP.
        if signal.getsignal(number) is not signal.SIG_IGN:
            self._previous.setdefault(number, signal.signal(number, self._receive))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
            number = signal.SIGTERM
        if not self._training:
            _write(f"[preemption] {NAMES[number]} before the first step: there is nothing to save")
            raise SystemExit(128 + number)
        if not self._received:
            self._received, self._at = number, time.monotonic()
            _write(f"[preemption] {NAMES[number]}: saving at the end of this step, then stopping")
        elif number == signal.SIGINT and time.monotonic() - self._at > SECONDS_OF_ONE_KEY:
            _write("[preemption] Ctrl-C again: ended at once")
            os._exit(128 + number)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Save and stop on all ranks if any rank has received a signal.

        Raises:
            SystemExit: A rank has received a signal.
        """
        told = torch.tensor(self._received, dtype=torch.int32, device=pl_module.device)
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
        if not (number := int(told)):
            return
        _save(trainer)
        if is_global_rank_zero():
            print(
                f"[preemption] {NAMES[number]}: step {trainer.global_step} is saved; the same "
                "command goes on from it",
                flush=True,
            )
        raise SystemExit(128 + number)

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
        """Restore the signal handlers."""
        self._restore(trainer)

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Restore the signal handlers."""
        self._restore(trainer)

    def _restore(self, trainer: pl.Trainer) -> None:
        # Lightning later restores the handlers found at the start of training: this callback's.
        handlers = trainer._signal_connector._original_handlers
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)
            if handlers.get(number) == self._receive:
                handlers[number] = handler


def _write(line: str) -> None:
    """Print once for all ranks, from a signal handler and thus without buffered output."""
    if is_global_rank_zero():
        os.write(1, f"\n{line}\n".encode())


def _save(trainer: pl.Trainer) -> None:
    checkpoint = trainer.checkpoint_callback
    if checkpoint is None:
        return
    if checkpoint._last_global_step_saved != trainer.global_step:
        checkpoint._save_last_checkpoint(trainer, checkpoint._monitor_candidates(trainer))
    saving = trainer.strategy.checkpoint_io
    if isinstance(saving, AsyncFinalizableCheckpointIO):
        saving.maybe_finalize_save_checkpoint(blocking=True)

"""Save and stop when a scheduler takes the machine back."""

import signal
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning import io
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO
from nemo.utils.get_rank import is_global_rank_zero


class PreemptionCallback(pl.Callback, io.IOMixin):
    """On SIGTERM save at the end of the step and exit with 143; the same command goes on.

    Slurm sends SIGTERM before it preempts or at `--signal=TERM@SECONDS` before a time limit, to any
    of the ranks. NeMo's own callback looks at the first rank alone, needs CUDA, and ends with 0: a
    job that waits for this one would go on with half a model.
    """

    def __init__(self) -> None:
        self._received = False
        self._previous: Any = signal.SIG_DFL

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen."""
        self._received = False
        self._previous = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, signal_number: int, frame: FrameType | None) -> None:
        self._received = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Save and stop on all ranks if one of them was told to.

        Raises:
            SystemExit: It was.
        """
        told = torch.tensor(self._received, dtype=torch.int32, device=pl_module.device)
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
        if not told.item():
            return
        _save(trainer)
        if is_global_rank_zero():
            print(
                f"[preemption] SIGTERM: step {trainer.global_step} is saved; the same command "
                "goes on from it",
                flush=True,
            )
        raise SystemExit(128 + signal.SIGTERM)

    def on_exception(self, *_: Any) -> None:
        """Stop listening."""
        self._restore()

    def on_train_end(self, *_: Any) -> None:
        """Stop listening."""
        self._restore()

    def _restore(self) -> None:
        signal.signal(signal.SIGTERM, self._previous)


def _save(trainer: pl.Trainer) -> None:
    checkpoint = trainer.checkpoint_callback
    if checkpoint is None:
        return
    if checkpoint._last_global_step_saved != trainer.global_step:
        checkpoint._save_last_checkpoint(trainer, checkpoint._monitor_candidates(trainer))
    saving = trainer.strategy.checkpoint_io
    if isinstance(saving, AsyncFinalizableCheckpointIO):
        saving.maybe_finalize_save_checkpoint(blocking=True)

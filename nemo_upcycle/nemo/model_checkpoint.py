"""NeMo's checkpoint callback without ways to lose steps, and with one error where saving fails."""

import re
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from megatron.core import dist_checkpointing
from nemo import lightning as nl
from nemo.collections import llm
from torch.distributed.checkpoint.api import CheckpointException

from nemo_upcycle.engine.ranks import Ranks
from nemo_upcycle.errors import UpcyclingError

SECONDS_TO_AGREE = 60.0
"""How long ranks that could not save wait to hear why."""

# torch says nothing but "inline_container" where a write has fallen short.
_NO_ROOM = re.compile("No space left|File too large|quota exceeded|inline_container|StreamWriter")
_LOST = re.compile("Connection closed|reset by peer|Broken pipe|Timed out", re.IGNORECASE)


class ModelCheckpoint(nl.ModelCheckpoint):
    """NeMo's callback, which saves the last step however the run's intervals fall.

    NeMo saves at the end of training only if the last step is no multiple of
    `val_check_interval`, taking it for granted that a validation has saved otherwise.
    """

    _began_at: int | None = None
    """The step at which the last pass over the data began."""

    _empty = 0
    """Passes without a step, one after another."""

    def setup(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Remove what a killed run left unfinished, and check what is resumed.

        Raises:
            UpcyclingError: The run was begun with another global batch size.
        """
        super().setup(trainer, *args, **kwargs)
        self._began_at, self._empty = None, 0
        if trainer.ckpt_path:
            _check_batch_size(trainer)

    def on_train_epoch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Look at what the pass over the data that has just ended has done.

        Raises:
            UpcyclingError: It has ended before the steps, and the next would bring the same samples
                again, or none without end.
        """
        step, began_at = trainer.global_step, self._began_at
        self._began_at, self._empty = step, self._empty + 1 if began_at == step else 0
        # Of NeMo's data one pass is made for all steps; of others one may be empty on a resume.
        once = isinstance(trainer.datamodule, llm.PreTrainingDataModule)
        if self._empty > 1 or (once and began_at not in (None, step)):
            raise UpcyclingError(
                f"The data end after step {step} of trainer.max_steps={trainer.max_steps}: there "
                "is no sample left that the run has not seen. Give the batch size and the data "
                "that the run began with, or another name for a new run."
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        super().on_train_end(trainer, pl_module)
        if self.save_last and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        try:
            super()._save_checkpoint(trainer, filepath)
        except CheckpointException as error:
            # Raised on all ranks, but only the coordinator's has the writers' errors in it.
            cause = _cause(error) if error.failures else None
            raise _unsaved(filepath, "; ".join(filter(None, _gather(cause)))) from error
        except (OSError, RuntimeError) as error:
            raise _unsaved(filepath, str(error)) from error


def _check_batch_size(trainer: pl.Trainer) -> None:
    """NeMo makes data for max_steps · global_batch_size samples, and goes on from the samples seen.

    With smaller batches they end before the steps do, and NeMo then looks for more without end.
    """
    common = dist_checkpointing.load_common_state_dict(str(trainer.ckpt_path))
    data = trainer.datamodule
    seen = common.get(type(data).__qualname__, {}).get("consumed_samples")
    steps, size = common["global_step"], getattr(data, "global_batch_size", None)
    if seen and size and seen != steps * size:
        # Steps of several sizes, as of a ramp-up, cannot be gone on with.
        again = f"Go on with {seen // steps}, or give" if seen % steps == 0 else "Give"
        raise UpcyclingError(
            f"The run has seen {seen} samples in {steps} steps; now global_batch_size={size} is "
            f"given. {again} another name for a new run."
        )


def _unsaved(filepath: str, cause: str) -> UpcyclingError:
    checkpoint = Path(filepath).with_suffix("")
    if _NO_ROOM.search(cause):
        free = shutil.disk_usage(checkpoint.parent).free / 2**30
        cause = (
            "a file could not be written in full, as the disk is full, or for a quota or a limit "
            f"on file sizes; {free:.1f} GiB are free there"
        )
    elif _LOST.search(cause):
        cause = "another rank failed or was lost; see what it said last"
    return UpcyclingError(
        f"The checkpoint {checkpoint} could not be saved: {cause}. The one before it is whole. "
        "Make room, or mend what is said here, and start the same command again: it removes what "
        "is unfinished and goes on from the last complete checkpoint."
    )


def _gather(cause: str | None) -> list[str | None]:
    try:
        return Ranks(SECONDS_TO_AGREE).gather(cause)
    except UpcyclingError as lost:
        return [cause or str(lost)]


def _cause(error: CheckpointException) -> str:
    """Return what the ranks' writers said, without tracebacks."""
    return "; ".join(f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items())

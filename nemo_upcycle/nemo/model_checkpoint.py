"""NeMo's checkpoint callback with fixes against lost steps, and one error if saving fails."""

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
"""Maximum time that ranks wait for the cause of a failed save, in seconds."""

# torch reports a short write only as "inline_container".
_NO_ROOM = re.compile("No space left|File too large|quota exceeded|inline_container|StreamWriter")
_LOST = re.compile("Connection closed|reset by peer|Broken pipe|Timed out", re.IGNORECASE)


class ModelCheckpoint(nl.ModelCheckpoint):
    """NeMo's callback, with a checkpoint of the last step whatever the run's intervals.

    At the end of training NeMo saves only if the last step is not a multiple of
    `val_check_interval`: NeMo assumes that a validation has already saved the step.
    """

    _began_at: int | None = None
    """Step at which the current pass over the data began."""

    _empty = 0
    """Number of consecutive passes without a step."""

    def setup(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Remove unfinished checkpoints of a killed run, and check the resumed checkpoint.

        Raises:
            UpcyclingError: The run was started with another global batch size.
        """
        super().setup(trainer, *args, **kwargs)
        self._began_at, self._empty = None, 0
        if trainer.ckpt_path:
            _check_batch_size(trainer)

    def on_train_epoch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Check the progress of the pass over the data that has just ended.

        Raises:
            UpcyclingError: The data ended before the last step. The next pass would repeat samples,
                or empty passes would repeat forever.
        """
        step, began_at = trainer.global_step, self._began_at
        self._began_at, self._empty = step, self._empty + 1 if began_at == step else 0
        # NeMo's data make one pass for all steps; other data may have an empty pass on a resume.
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
            # All ranks raise, but only the coordinator's error contains the writers' errors.
            cause = _cause(error) if error.failures else None
            raise _unsaved(filepath, "; ".join(filter(None, _gather(cause)))) from error
        except (OSError, RuntimeError) as error:
            raise _unsaved(filepath, str(error)) from error


def _check_batch_size(trainer: pl.Trainer) -> None:
    """Check that the samples seen match the steps and the global batch size.

    NeMo makes data for max_steps · global_batch_size samples, and continues after the samples seen.
    With a smaller batch the data would end before the last step, and NeMo would loop forever.

    Raises:
        UpcyclingError: The global batch size has changed.
    """
    common = dist_checkpointing.load_common_state_dict(str(trainer.ckpt_path))
    data = trainer.datamodule
    seen = common.get(type(data).__qualname__, {}).get("consumed_samples")
    steps, size = common["global_step"], getattr(data, "global_batch_size", None)
    if seen and size and seen != steps * size:
        # Resuming is impossible if the batch size varied, as in a ramp-up.
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
    """Return the writers' errors of all ranks, without tracebacks."""
    return "; ".join(f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items())

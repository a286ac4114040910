"""NeMo's resume, for runs that were killed at any moment."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from megatron.core import dist_checkpointing
from nemo import lightning as nl
from nemo.utils import AppState
from nemo.utils.get_rank import is_global_rank_zero

from nemo_upcycle.checkpoint.run_directory import age, is_complete
from nemo_upcycle.errors import UpcyclingError

_LAST = re.compile(r"-last(-v\d+)?$")


@dataclass(kw_only=True)
class AutoResume(nl.AutoResume):
    """Resume from the newest complete checkpoint of the run; start anew where there is none.

    NeMo refuses to start where the only checkpoint is one that was being written when the run was
    killed, and takes the newest of several by the time stamps of their directories, which a copy
    changes.
    """

    def setup(self, trainer: pl.Trainer, model: Any = None) -> None:
        """Tell the trainer what to resume from.

        Raises:
            UpcyclingError: The run has made all its steps.
        """
        super().setup(trainer, model)
        if trainer.ckpt_path and 0 < trainer.max_steps <= (step := saved_step(trainer.ckpt_path)):
            raise UpcyclingError(
                f"The run has made all its steps: {trainer.ckpt_path} is after step {step} of "
                f"max_steps={trainer.max_steps}. Give more steps, or another name for a new run."
            )

    def _find_trainer_ckpt_path(self) -> Path | None:
        directory = self._directory()
        checkpoints = sorted(
            (path for path in directory.glob("*-last*") if _LAST.search(path.name)), key=age
        )
        complete = [path for path in checkpoints if is_complete(path)]
        found = complete[-1] if complete else None
        for path in checkpoints:
            if path not in complete:
                _print(f"[resume] {path} is not complete: the run was killed as it was written")
            elif path != found:
                _print(f"[resume] {path} is older and not used: remove it if you need the room")
        if found is None:
            # What is not complete is none: NeMo's own message and choice for that.
            _print(f"[resume] no complete checkpoint in {directory}: starting anew")
            if not self.resume_ignore_no_checkpoint:
                return super()._find_trainer_ckpt_path()
        return found

    def _directory(self) -> Path:
        return Path(self.resume_from_directory or Path(AppState().log_dir) / "checkpoints")


def saved_step(weights: Path | str) -> int:
    """Return how many steps had been made when a checkpoint was saved.

    Args:
        weights: The directory of its weights.

    Raises:
        UpcyclingError: It is damaged.
    """
    try:
        return dist_checkpointing.load_common_state_dict(str(weights))["global_step"]
    except Exception as error:
        raise UpcyclingError(
            f"The run cannot be resumed from {weights}: {error}. It is damaged; remove it to go "
            "on from an older checkpoint of the run, or to start anew."
        ) from error


def _print(text: str) -> None:
    if is_global_rank_zero():
        print(text, flush=True)

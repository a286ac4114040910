"""NeMo's resume, robust against runs that were killed at any moment."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from megatron.core import dist_checkpointing
from nemo import lightning as nl
from nemo.utils import AppState
from nemo.utils.get_rank import is_global_rank_zero

from nemo_upcycle.checkpoint.run_directory import age, is_complete
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.nemo import run_lock
from nemo_upcycle.nemo.provenance import Provenance, say
from nemo_upcycle.nemo.run_numbers import check_trainer

_LAST = re.compile(r"-last(-v\d+)?$")


@dataclass(kw_only=True)
class AutoResume(nl.AutoResume):
    """Resume from the newest complete checkpoint of the run, or start anew if there is none.

    NeMo refuses to start if the only checkpoint was being written when the run was killed. NeMo
    also chooses the newest checkpoint by time stamps of directories, which a copy changes. The
    run's directory is locked before the search.

    Args:
        seconds_to_wait: How long to wait for another start of the run to end.
    """

    seconds_to_wait: float = run_lock.SECONDS_TO_WAIT
    _prefix: str = field(default="", init=False, repr=False)

    def setup(self, trainer: pl.Trainer, model: Any = None) -> None:
        """Set the checkpoint from which the trainer resumes.

        Raises:
            UpcyclingError: The run has no steps or has made all steps, or another start of the run
                is active. In the latter case `Provenance`, if used, raises on all ranks.
        """
        check_trainer(trainer)
        self._lock(next((c for c in trainer.callbacks if isinstance(c, Provenance)), None))
        try:
            self._choose(trainer, model)
        except BaseException:
            run_lock.release(Path(AppState().log_dir))
            raise

    def _lock(self, provenance: Provenance | None) -> None:
        """Lock the run's directory; if already locked, let `Provenance` raise on all ranks."""
        if is_global_rank_zero():
            try:
                run_lock.take(Path(AppState().log_dir), self.seconds_to_wait)
            except UpcyclingError as error:
                if provenance is None:
                    raise
                provenance.lock_error = error
        if provenance is not None and self.restore_config is not None:
            provenance.restored = str(self.restore_config.path)

    def _choose(self, trainer: pl.Trainer, model: Any) -> None:
        filename = str(getattr(trainer.checkpoint_callback, "filename", None) or "")
        if "/" in filename:
            raise UpcyclingError(
                f"log.ckpt.filename is {filename!r}: checkpoints in directories of their own are "
                "not found again. Leave the / out; the run's name may have one."
            )
        self._prefix = filename.partition("{")[0]
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
        # A copied checkpoint of another run is used only if this run has none.
        own = [path for path in complete if path.name.startswith(self._prefix)]
        latest = own[-1] if own else complete[-1] if complete else None
        for path in checkpoints:
            if path not in complete:
                say(f"[resume] {path} is not complete: the run was killed as it was written")
            elif own and path not in own:
                say(f"[resume] {path} was saved under another name and is not used")
            elif path != latest:
                say(f"[resume] {path} is older and not used: remove it if you need the room")
        if latest is not None and not own:
            say(f"[resume] {latest} was saved under another name: this run goes on from it")
        if latest is None:
            # No complete checkpoint: NeMo decides, with NeMo's own message.
            say(f"[resume] no complete checkpoint in {directory}: starting anew")
            if not self.resume_ignore_no_checkpoint:
                return super()._find_trainer_ckpt_path()
        return latest

    def _directory(self) -> Path:
        return Path(self.resume_from_directory or Path(AppState().log_dir) / "checkpoints")


def saved_step(weights: Path | str) -> int:
    """Return the number of steps before a checkpoint.

    Args:
        weights: The directory of the checkpoint's weights.

    Raises:
        UpcyclingError: The checkpoint is damaged.
    """
    try:
        return dist_checkpointing.load_common_state_dict(str(weights))["global_step"]
    except Exception as error:
        raise UpcyclingError(
            f"The run cannot be resumed from {weights}: {error}. It is damaged; remove it to go "
            "on from an older checkpoint of the run, or to start anew."
        ) from error

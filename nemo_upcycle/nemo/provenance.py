"""Origin and settings of a run, stored in the run's checkpoints and compared on a resume."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from megatron.core import dist_checkpointing
from nemo.utils import AppState
from nemo.utils.get_rank import is_global_rank_zero

from nemo_upcycle.checkpoint import MegatronCheckpoint
from nemo_upcycle.checkpoint.fingerprint import weights_fingerprint
from nemo_upcycle.checkpoint.kept import kept_of
from nemo_upcycle.engine.provenance import RANDOM, RESTORED, Origin, mapping_of
from nemo_upcycle.engine.ranks import TIMEOUT_S, Ranks, check_same, said_on_every_rank
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.nemo import run_lock
from nemo_upcycle.nemo.hyperparameters import Hyperparameters, is_function_of_step
from nemo_upcycle.nemo.recorded import Recorded
from nemo_upcycle.nemo.run_numbers import check_numbers
from nemo_upcycle.nemo.run_settings import compare, settings_of


class Provenance(pl.Callback, Recorded):
    """Store a run's origin and settings in the run's checkpoints.

    A resume with other settings is either refused, or applies the new settings and reports the
    change. This class is for runs from random weights; `UpcyclingCallback` is a subclass with a
    dense checkpoint.

    Args:
        model_of: Checkpoint whose config the model has, and whose tokens and context length an
            export keeps; None if there is none.
        timeout_s: Seconds that a rank waits for the slowest before assuming that it is lost.
    """

    prefix = "[run]"

    def __init__(self, model_of: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self.model_of = model_of
        self.timeout_s = timeout_s
        self._reset()

    def _reset(self) -> None:
        self._ranks: Ranks | None = None
        self._origin: Origin | None = None
        self._changes: list[str] = []
        self._remarks: list[str] = []
        self._hyperparameters: Hyperparameters | None = None
        self.lock_error: UpcyclingError | None = None
        self.restored: str | None = None

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint, fixed for compatibility across these callbacks."""
        return "UpcyclingCallback"

    def state_dict(self) -> dict[str, Any]:
        """Return the run's origin and settings, for the run's checkpoints."""
        return asdict(self._origin) if self._origin else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: `setup` has read the state before the model was made."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check origin and settings before the model is made.

        Raises:
            UpcyclingError: Another start of the run is active, a number is out of range, or the
                initial weights cannot be used. Also if a resume contradicts the run's first start.
                Raised on every rank.
        """
        if stage != "fit":
            return
        with said_on_every_rank(self.prefix):
            self._ranks = Ranks(self.timeout_s)
            self._ranks.on_all(lambda: self._check(trainer, pl_module))
            views = self._ranks.gather((str(trainer.ckpt_path), self._origin))
            check_same("checkpoints to resume from", [path for path, _ in views])
            check_same(
                "dense checkpoints", [prepared and prepared.fingerprint for _, prepared in views]
            )
        for line in (*self._remarks, *(f"[resume] {change}" for change in self._changes)):
            say(line)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the command's settings, which loading a checkpoint overwrites.

        Raises:
            UpcyclingError: The learning-rate schedule does not support a change during a run.
        """
        if not trainer.ckpt_path:
            return
        self._hyperparameters = Hyperparameters(trainer)
        changed = [change for change in self._changes if change.startswith("optim.")]
        for config in trainer.lr_scheduler_configs:
            if changed and not is_function_of_step(config.scheduler):
                raise UpcyclingError(
                    f"{type(config.scheduler).__name__} cannot be changed while a run trains "
                    f"({'; '.join(changed)}). Give the first values, or another name for a new run."
                )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Apply the command's settings."""
        if self._hyperparameters is not None:
            self._hyperparameters.apply(trainer)
            self._hyperparameters = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Unlock the run's directory."""
        _release()

    def on_exception(self, *_: Any) -> None:
        """Unlock the run's directory."""
        _release()

    def begin(self, trainer: pl.Trainer, config: Any) -> Origin:
        """Return the run's origin according to the command.

        Args:
            trainer: The trainer.
            config: The model's config.
        """
        # The settings contain the other fields of the model.
        model = {
            name: getattr(config, name, None) for name in ("num_moe_experts", "moe_router_topk")
        }
        kept = None
        if self.model_of is not None:
            try:
                kept = kept_of(self.model_of)
            except UpcyclingError as error:
                say(f"[run] an export will not have the dense model's tokens: {error}")
        if self.restored is None:
            return Origin(None, None, model, kept, RANDOM)
        return Origin(self.restored, _fingerprint(self.restored), model, kept, RESTORED)

    def _check(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.lock_error is not None:
            raise self.lock_error
        self._remarks = [f"[run] {remark}" for remark in check_numbers(trainer, module)]
        settings = settings_of(trainer, module)
        mapping = mapping_of(trainer.strategy, trainer.world_size, trainer.num_devices)
        now = replace(self.begin(trainer, module.config), settings=settings, mapping=mapping)
        self._remarks += _beyond_context(now, settings.get("data.seq_length"))
        self._origin, self._changes = now, []
        if not trainer.ckpt_path:
            return
        saved = self._saved_origin(trainer.ckpt_path)
        if saved is not None:
            saved.check(now, str(trainer.ckpt_path))
            self._changes = compare(saved.settings, settings, str(trainer.ckpt_path))
            # Older versions did not record `kept`.
            kept = saved.kept or now.kept
            self._origin = replace(saved, settings=settings, kept=kept, mapping=mapping)
        if saved is None or not saved.settings:
            self._changes = [
                f"{trainer.ckpt_path} does not say what the run was begun or trained with: an "
                "older version, or another program, has saved it. It is taken as it is"
            ]

    def _saved_origin(self, weights: str | Path) -> Origin | None:
        """Return the origin stored in a checkpoint of the run, if any.

        Read before the model is made, because a model of another shape could not be loaded.
        """
        common = dist_checkpointing.load_common_state_dict(str(weights))
        saved = common.get("callbacks", {}).get(self.state_key)
        return Origin(**saved) if saved else None


def say(text: str) -> None:
    """Print a line, once for all ranks."""
    if is_global_rank_zero():
        print(text, flush=True)


def _beyond_context(origin: Origin, seq_length: int | None) -> list[str]:
    """Return a remark if sequences exceed the weights' context length, which may be intended."""
    context = (origin.kept or {}).get("max_position_embeddings")
    if origin.weights == RANDOM or not context or not seq_length or seq_length <= context:
        return []
    return [
        f"[run] data.seq_length is {seq_length}, beyond the context of {context} that the dense "
        "model has: the run extends it"
    ]


def _fingerprint(restored: str) -> str | None:
    """Return a fingerprint of restored weights; None if the weights cannot be read.

    A resume does not need the weights. At the first start, NeMo reports what is wrong with them.
    """
    try:
        return weights_fingerprint(MegatronCheckpoint(restored, experts=True))
    except UpcyclingError:
        return None


def _release() -> None:
    if directory := AppState().log_dir:
        run_lock.release(Path(directory))

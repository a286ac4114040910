"""What a run began from and is trained with: kept in its checkpoints, compared on a resume."""

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
from nemo_upcycle.engine.provenance import RANDOM, RESTORED, Origin
from nemo_upcycle.engine.ranks import TIMEOUT_S, Ranks, check_same, said_on_every_rank
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.nemo import run_lock
from nemo_upcycle.nemo.hyperparameters import Hyperparameters, is_function_of_step
from nemo_upcycle.nemo.recorded import Recorded
from nemo_upcycle.nemo.run_numbers import check_numbers
from nemo_upcycle.nemo.run_settings import compare, settings_of


class Provenance(pl.Callback, Recorded):
    """Keep in a run's checkpoints what it began from and is trained with.

    A resume that says otherwise is refused, or takes what the command says and says so. On its own
    this callback is for runs from random weights; `UpcyclingCallback` is one that has a checkpoint.

    Args:
        model_of: Checkpoint whose config the model has, and whose tokens and context length an
            export keeps; None where there is none.
        timeout_s: Seconds that a rank waits for the slowest before it takes it for lost.
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
        """Where a checkpoint has it: the first of these callbacks gave the name."""
        return "UpcyclingCallback"

    def state_dict(self) -> dict[str, Any]:
        """Return what the run began from and is trained with, for its checkpoints."""
        return asdict(self._origin) if self._origin else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: `setup` has read it, before the model was made."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check, before the model is made, what the run starts from or resumes.

        Raises:
            UpcyclingError: Another start of the run is at work, a number is out of range, or the
                initial weights cannot be used. Or a resume contradicts the run's beginning. Raised
                on every rank.
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
        """Remember what the command says, which loading a checkpoint overwrites.

        Raises:
            UpcyclingError: The learning rate's schedule cannot be changed half-way.
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
        """Take what the command says."""
        if self._hyperparameters is not None:
            self._hyperparameters.apply(trainer)
            self._hyperparameters = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let others have the run's directory."""
        _release()

    def on_exception(self, *_: Any) -> None:
        """Let others have the run's directory."""
        _release()

    def begin(self, trainer: pl.Trainer, config: Any) -> Origin:
        """Return what the command says that the run begins from.

        Args:
            trainer: The trainer.
            config: The model's config.
        """
        # What else the model is, the settings say.
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
        now = replace(self.begin(trainer, module.config), settings=settings)
        self._remarks += _beyond_context(now, settings.get("data.seq_length"))
        self._origin, self._changes = now, []
        if not trainer.ckpt_path:
            return
        saved = self._saved_origin(trainer.ckpt_path)
        if saved is not None:
            saved.check(now, str(trainer.ckpt_path))
            self._changes = compare(saved.settings, settings, str(trainer.ckpt_path))
            # An older version has not recorded what is kept.
            self._origin = replace(saved, settings=settings, kept=saved.kept or now.kept)
        if saved is None or not saved.settings:
            self._changes = [
                f"{trainer.ckpt_path} does not say what the run was begun or trained with: an "
                "older version, or another program, has saved it. It is taken as it is"
            ]

    def _saved_origin(self, weights: str | Path) -> Origin | None:
        """Read what a checkpoint of the run says, if it says anything.

        Before the model is made: one of another shape could not be loaded.
        """
        common = dist_checkpointing.load_common_state_dict(str(weights))
        saved = common.get("callbacks", {}).get(self.state_key)
        return Origin(**saved) if saved else None


def say(text: str) -> None:
    """Print a line, once for all ranks."""
    if is_global_rank_zero():
        print(text, flush=True)


def _beyond_context(origin: Origin, seq_length: int | None) -> list[str]:
    """Say where sequences are longer than what the weights have seen: it may be meant."""
    context = (origin.kept or {}).get("max_position_embeddings")
    if origin.weights == RANDOM or not context or not seq_length or seq_length <= context:
        return []
    return [
        f"[run] data.seq_length is {seq_length}, beyond the context of {context} that the dense "
        "model has: the run extends it"
    ]


def _fingerprint(restored: str) -> str | None:
    """Return what tells restored weights from others; None where they cannot be read.

    A resume does not need them, and NeMo says what is wrong with them at the first start.
    """
    try:
        return weights_fingerprint(MegatronCheckpoint(restored, experts=True))
    except UpcyclingError:
        return None


def _release() -> None:
    if directory := AppState().log_dir:
        run_lock.release(Path(directory))

"""The Lightning callback that upcycles a dense checkpoint as the model loads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from nemo.utils import AppState
from nemo.utils.get_rank import is_global_rank_zero
from nemo.utils.model_utils import unwrap_model

from nemo_upcycle.checkpoint import DenseCheckpoint
from nemo_upcycle.config import Exactness, UpcyclingConfig
from nemo_upcycle.data.encoder import other_tokenizer
from nemo_upcycle.engine.provenance import Origin
from nemo_upcycle.engine.ranks import TIMEOUT_S, said_on_every_rank
from nemo_upcycle.engine.upcycling import Prepared, Report, fill_all, prepare
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.fields import upcycling_in
from nemo_upcycle.nemo.provenance import Provenance, say

_WAY_OUT = (
    "Leave these fields to the checkpoint's config: give a dense_checkpoint that can be read where "
    "the recipe is made, or set model.config.FIELD to what is expected."
)


class UpcyclingCallback(Provenance):
    """Fill the model from a dense checkpoint on a fresh start; do nothing on a resume.

    Every rank reads only the slices of the dense checkpoint that fill its own shards, and writes
    the slices in place; no rank holds the dense model. Number and width of experts, MoE layers,
    top-k, router order and capacity are read from the model's config. A model without experts gets
    the dense weights (the continued-training control).

    The origin of the weights is recorded in the run's checkpoints; a resume that contradicts the
    record is refused.

    Args:
        dense_checkpoint: Directory in the format of Hugging Face, NeMo 2 or Megatron-LM, or a
            model's name in the local Hugging Face cache. Several, separated by semicolons, give
            experts in turn, and all other weights are averaged (Branch-Train-MiX).
        initializer: Initializer of experts, such as `copy`, `drop(ratio=0.3)`; see `initializers`.
        weight_scaling: `exact`, `paper`, `none`, or None; see `UpcyclingConfig`.
        router_initializer: Initializer of routers, such as `centroids(stats='FILE')`.
        router_init_std: Standard deviation of the router weights; None takes the model's
            `init_method_std`.
        seed: Seed of all random values.
        read_once: Read each slice of the dense checkpoint once per job and broadcast the slice to
            all ranks that hold it. For file systems that are slower than the network between
            nodes. Otherwise every rank reads what it needs, through the node's page cache.
        timeout_s: Seconds that a rank waits for the slowest before assuming that it is lost.

    Source: online upcycling, arXiv 2412.09952 §3.
    """

    prefix = "[upcycle]"

    def __init__(
        self,
        dense_checkpoint: str,
        initializer: str = "copy",
        weight_scaling: str | None = None,
        router_initializer: str = "virtual_groups",
        router_init_std: float | None = None,
        seed: int = 1234,
        read_once: bool = False,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.dense_checkpoint = dense_checkpoint
        self.initializer = initializer
        self.weight_scaling = weight_scaling
        self.router_initializer = router_initializer
        self.router_init_std = router_init_std
        self.seed = seed
        self.read_once = read_once
        self.timeout_s = timeout_s
        self._prepared: Prepared | None = None
        self._reset()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Upcycle, unless the trainer resumes.

        Raises:
            UpcyclingError: The checkpoint cannot be used; raised on every rank.
        """
        super().on_fit_start(trainer, pl_module)
        if trainer.ckpt_path:
            say(f"{self.prefix} resuming from {trainer.ckpt_path}: not upcycling again")
            return
        assert self._ranks is not None and self._prepared is not None
        chunks = [unwrap_model(chunk.module) for chunk in trainer.strategy.megatron_parallel]
        with said_on_every_rank(self.prefix):
            report = fill_all(self._prepared, chunks, pl_module.config, self._ranks, self.read_once)
        report = _with_tokenizer(report, pl_module, self._prepared.checkpoint)
        # The first rank alone knows the tokenizer; checkpoints hold the same on every rank.
        (step0, *_) = self._ranks.gather(str(report.exactness))
        self._origin = self._origin and replace(self._origin, step0=step0)
        # Mixed precision trains fp32 copies, which were made before the weights were loaded.
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, "mcore_optimizer"):
                optimizer.mcore_optimizer.reload_model_params()
        say("\n".join(f"{self.prefix} {line}" for line in str(report).splitlines()))

    def begin(self, trainer: pl.Trainer, config: Any) -> Origin:
        """Check the dense checkpoint; return the origin of the run."""
        upcycling = self.upcycling(config)
        try:
            self._prepared = prepare(self.dense_checkpoint, upcycling)
            for branch in self._prepared.checkpoint.branches:
                _check_not_own_output(branch.directory)
        except UpcyclingError as error:
            if not trainer.ckpt_path:
                raise
            # The run's own checkpoint has the weights.
            say(f"{self.prefix} the resume does not need the dense checkpoint: {error}")
            return Origin.of(self.dense_checkpoint, None, upcycling)
        if not trainer.ckpt_path:
            _check_no_other_source(trainer)
            tokenizer = getattr(trainer.lightning_module, "tokenizer", None)
            self._prepared.check_model(
                config, tokenizer_size=getattr(tokenizer, "vocab_size", None), way_out=_WAY_OUT
            )
        prepared = self._prepared
        return Origin.of(self.dense_checkpoint, prepared.fingerprint, upcycling, prepared.kept)

    def upcycling(self, config: Any) -> UpcyclingConfig:
        """Return the upcycling, from the model's config and this callback's arguments."""
        std = self.router_init_std
        return upcycling_in(
            config,
            initializer=self.initializer,
            weight_scaling=self.weight_scaling,
            router_initializer=self.router_initializer,
            router_init_std=config.init_method_std if std is None else std,
            seed=self.seed,
        )


def _with_tokenizer(
    report: Report, module: pl.LightningModule, checkpoint: DenseCheckpoint
) -> Report:
    """Return the report; step 0 is not exact if the tokenizer gives texts other tokens."""
    tokenizer = getattr(getattr(module, "tokenizer", None), "tokenizer", None)
    if tokenizer is None or not is_global_rank_zero():
        return report
    own = other_tokenizer(tokenizer, checkpoint.branches[0].directory)
    if own is None:
        return report
    why = f"the tokenizer gives texts other tokens than {own}, which is beside the dense weights"
    return replace(report, exactness=Exactness(False, f"{why}; the weights: {report.exactness}"))


def _check_no_other_source(trainer: pl.Trainer) -> None:
    restore = getattr(trainer.strategy, "restore_config", None)
    if restore is not None:
        raise UpcyclingError(
            f"Both a dense checkpoint to upcycle and resume.restore_config "
            f"({restore.path}) were given; expected one source of weights. Drop one."
        )


def _check_not_own_output(dense: Path) -> None:
    """Check that the dense checkpoint is outside the run's directory, where NeMo moves files."""
    run = AppState().log_dir
    if run and Path(run).resolve() in (dense.resolve(), *dense.resolve().parents):
        raise UpcyclingError(
            f"The dense checkpoint {dense} lies in the run's own directory {run}, which the run "
            "would change; expected one outside. Give the run another name or directory."
        )

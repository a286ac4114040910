"""The Lightning callback that upcycles a dense checkpoint as the model loads."""

import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from nemo.utils import AppState
from nemo.utils.get_rank import is_global_rank_zero
from nemo.utils.model_utils import unwrap_model
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from nemo_upcycle.agreement import check_agreement, exactness_of
from nemo_upcycle.checkpoint import DenseCheckpoint
from nemo_upcycle.checkpoint.branches import open_branches
from nemo_upcycle.checkpoint.described import checked, described
from nemo_upcycle.checkpoint.kept import kept_of
from nemo_upcycle.config import Exactness, UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.load import LoadReport, check_all_used, upcycle
from nemo_upcycle.model import upcycling_of
from nemo_upcycle.origin import Origin
from nemo_upcycle.probe import fingerprint
from nemo_upcycle.ranks import TIMEOUT_S
from nemo_upcycle.training.provenance import Provenance, said_on_every_rank, say

SECONDS_BETWEEN_LINES = 5.0
"""How often a log, which is no terminal, gets a line of progress."""


class UpcyclingCallback(Provenance):
    """Fill the model from a dense checkpoint on a fresh start; do nothing on a resume.

    Every rank reads only the slices of the dense checkpoint that fill its own shards and writes
    them in place; no rank holds the dense model. Number and width of experts, MoE layers, top-k,
    router order and capacity are read from the model's config. A model without experts is filled
    as it is (the continued-training control).

    What the run was upcycled from is kept in its checkpoints; a resume that says otherwise is
    refused.

    Args:
        dense_checkpoint: Directory of Hugging Face's, NeMo 2's or Megatron-LM's, or the name of a
            model in the local Hugging Face cache. Several, separated by semicolons, give experts
            from each in turn, and everything else their average (Branch-Train-MiX).
        initializer: What fills experts, such as `copy`, `drop(ratio=0.3)`; see `initializers`.
        weight_scaling: `exact`, `paper`, `none`, or None; see `UpcyclingConfig`.
        router_initializer: `virtual_groups` or `random`; see `UpcyclingConfig`.
        router_init_std: Standard deviation of the router weights; None takes the model's
            `init_method_std`.
        seed: Seed of all random values.
        read_once: Read each slice of the dense checkpoint once a job and broadcast it to the ranks
            that hold it, for file systems that are slower than the network between nodes.
            Otherwise every rank reads what it needs, and a node's ranks share its page cache.
        timeout_s: Seconds that a rank waits for the slowest before it takes it for lost.

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
        self._checkpoint: DenseCheckpoint | None = None
        self._config: Any = None
        self._reset()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Upcycle, unless the trainer resumes.

        Raises:
            UpcyclingError: The checkpoint cannot be used; raised on every rank.
        """
        super().on_fit_start(trainer, pl_module)
        if trainer.ckpt_path:
            say(f"[upcycle] resuming from {trainer.ckpt_path}: not upcycling again")
            return
        with said_on_every_rank(self.prefix):
            self._upcycle(trainer, self.upcycling(pl_module.config))

    def _upcycle(self, trainer: pl.Trainer, upcycling: UpcyclingConfig) -> None:
        assert self._ranks is not None and self._checkpoint is not None
        report, error = None, None
        try:
            chunks = [unwrap_model(chunk.module) for chunk in trainer.strategy.megatron_parallel]
            with _ProgressPrinter() as progress:
                report = upcycle(chunks, self._checkpoint, upcycling, progress, self.read_once)
        except Exception as exception:
            error = exception
        self._ranks.raise_on_all(error)
        reports = self._ranks.gather(report)
        check_all_used(self._checkpoint, reports)
        # Mixed precision trains fp32 copies, made before the weights were there.
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, "mcore_optimizer"):
                optimizer.mcore_optimizer.reload_model_params()
        self._print_report(reports, upcycling)

    def begin(self, trainer: pl.Trainer, config: Any) -> Origin:
        """Return the dense checkpoint and what it becomes, once it is known to be usable."""
        try:
            self._checkpoint = open_branches(self.dense_checkpoint)
            for branch in self._checkpoint.branches:
                _check_not_own_output(branch.directory)
            found, kept = fingerprint(self._checkpoint), kept_of(self._checkpoint.branches[0])
        except UpcyclingError as error:
            if not trainer.ckpt_path:
                raise
            # The weights are in the run's own checkpoint by now.
            say(f"[upcycle] the resume does not need the dense checkpoint: {error}")
            found, kept = None, None
        if not trainer.ckpt_path:
            self._check_restore(trainer)
            self._check_agreement(trainer.lightning_module)
        return Origin.of(self.dense_checkpoint, found, self.upcycling(config), kept)

    def upcycling(self, config: Any) -> UpcyclingConfig:
        """Return what the model's config and this callback say the dense model becomes."""
        std = self.router_init_std
        return upcycling_of(
            config,
            initializer=self.initializer,
            weight_scaling=self.weight_scaling,
            router_initializer=self.router_initializer,
            router_init_std=config.init_method_std if std is None else std,
            seed=self.seed,
        )

    def _check_agreement(self, model: Any) -> None:
        """Check that the model is the dense checkpoint's, by headers and configs alone."""
        assert self._checkpoint is not None
        _, arch = checked(self._checkpoint)
        tokenizer = getattr(model, "tokenizer", None)
        check_agreement(model.config, arch, getattr(tokenizer, "vocab_size", None))
        self._config = model.config

    @staticmethod
    def _check_restore(trainer: pl.Trainer) -> None:
        restore = getattr(trainer.strategy, "restore_config", None)
        if restore is not None:
            raise UpcyclingError(
                f"Both a dense checkpoint to upcycle and resume.restore_config "
                f"({restore.path}) were given; expected one source of weights. Drop one."
            )

    def _exactness(self, upcycling: UpcyclingConfig) -> Exactness:
        assert self._checkpoint is not None
        _, arch = described(self._checkpoint)
        return exactness_of(self._config, upcycling, arch, len(self._checkpoint.branches))

    def _print_report(self, reports: list[LoadReport], upcycling: UpcyclingConfig) -> None:
        tensors = frozenset().union(*(report.tensors for report in reports))
        most = max(reports, key=lambda r: r.bytes_read)
        say(
            "\n".join(
                [
                    f"[upcycle] {self.dense_checkpoint} → {upcycling.label} "
                    f"on {len(reports)} rank(s)",
                    f"[upcycle]   tensors mapped    {len(tensors)} dense → "
                    f"{sum(r.shards for r in reports)} shards",
                    f"[upcycle]   bytes read        {_size(sum(r.bytes_read for r in reports))} in "
                    f"all, at most {_size(most.bytes_read)} a rank",
                    f"[upcycle]   time              {max(r.seconds for r in reports):.2f} s",
                    f"[upcycle]   peak memory       "
                    f"{_size(max(r.peak_resident_bytes for r in reports))} resident a rank",
                    f"[upcycle]   step 0            {self._exactness(upcycling)}",
                ]
            )
        )


def _check_not_own_output(dense: Path) -> None:
    """NeMo moves away the files in a run's directory, and removes old checkpoints in it."""
    run = AppState().log_dir
    if run and Path(run).resolve() in (dense.resolve(), *dense.resolve().parents):
        raise UpcyclingError(
            f"The dense checkpoint {dense} lies in the run's own directory {run}, which the run "
            "would change; expected one outside. Give the run another name or directory."
        )


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


class _ProgressPrinter:
    """Rank 0's progress: a bar on a terminal, some plain lines in a log."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._started = self._last_line = time.perf_counter()
        self._active = is_global_rank_zero()
        if self._active and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("[upcycle]", markup=False),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(),
            )
            self._task = self._bar.add_task("upcycle", total=None)

    def __enter__(self) -> "_ProgressPrinter":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._bar:
            self._bar.update(self._task, completed=done, total=total)
        elif self._active and time.perf_counter() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.perf_counter()
            seconds = self._last_line - self._started
            left = seconds * (total - done) / done
            print(
                f"[upcycle] {done / total:4.0%} read, {_size(done / seconds)}/s, {left:.0f} s left",
                flush=True,
            )

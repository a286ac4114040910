"""The Lightning callback that upcycles a dense checkpoint as the model loads."""

import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning import io
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

from nemo_upcycle.checkpoint import HuggingFaceCheckpoint
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.load import LoadReport, check_all_used, raise_on_all_ranks, upcycle

SECONDS_BETWEEN_LINES = 5.0
"""How often a log, which is no terminal, gets a line of progress."""


class UpcyclingCallback(pl.Callback, io.IOMixin):
    """Fill the model from a dense checkpoint on a fresh start; do nothing on a resume.

    Every rank reads only the slices of the dense checkpoint that fill its own shards and writes
    them in place; no rank holds the dense model. Number of experts, top-k, router order and
    capacity are read from the model's config. A model without experts is filled as it is (the
    continued-training control).

    Args:
        dense_checkpoint: Directory with `config.json` and safetensors files, or the name of a
            model in the local Hugging Face cache.
        router_init_std: Standard deviation of the router weights; None takes the model's
            `init_method_std`.
        seed: Seed of the router weights.

    Source: online upcycling, arXiv 2412.09952 §3.
    """

    def __init__(
        self,
        dense_checkpoint: str,
        router_init_std: float | None = None,
        seed: int = 1234,
    ) -> None:
        self.dense_checkpoint = dense_checkpoint
        self.router_init_std = router_init_std
        self.seed = seed

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Upcycle, unless the trainer resumes.

        Raises:
            UpcyclingError: The checkpoint cannot be used; raised on every rank.
        """
        if trainer.ckpt_path:
            _print(f"[upcycle] resuming from {trainer.ckpt_path}: not upcycling again")
            return
        report, error = None, None
        try:
            self._check_restore(trainer)
            upcycling = self._config(pl_module.config)
            chunks = [unwrap_model(chunk.module) for chunk in trainer.strategy.megatron_parallel]
            checkpoint = HuggingFaceCheckpoint(self.dense_checkpoint)
            with _ProgressPrinter() as progress:
                report = upcycle(chunks, checkpoint, upcycling, progress)
        except Exception as exception:
            # Whatever it is, the other ranks must hear of it before this one stops.
            error = exception
        _raise_on_all_ranks(error)
        assert report is not None
        reports = _gather(report)
        check_all_used(checkpoint, reports)
        # Mixed precision trains fp32 copies, made before the weights were there.
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, "mcore_optimizer"):
                optimizer.mcore_optimizer.reload_model_params()
        self._print_report(reports, upcycling)

    def _config(self, config: Any) -> UpcyclingConfig:
        std = self.router_init_std
        return UpcyclingConfig(
            num_moe_experts=config.num_moe_experts,
            moe_router_topk=config.moe_router_topk,
            moe_router_pre_softmax=config.moe_router_pre_softmax,
            moe_expert_capacity_factor=config.moe_expert_capacity_factor,
            router_init_std=config.init_method_std if std is None else std,
            seed=self.seed,
        )

    @staticmethod
    def _check_restore(trainer: pl.Trainer) -> None:
        restore = getattr(trainer.strategy, "restore_config", None)
        if restore is not None:
            raise UpcyclingError(
                f"Both a dense checkpoint to upcycle and resume.restore_config "
                f"({restore.path}) were given; expected one source of weights. Drop one."
            )

    def _print_report(self, reports: list[LoadReport], upcycling: UpcyclingConfig) -> None:
        tensors = frozenset().union(*(report.tensors for report in reports))
        experts = upcycling.num_moe_experts
        shape = "dense, as it is" if experts is None else f"E{experts}T{upcycling.moe_router_topk}"
        most = max(reports, key=lambda r: r.bytes_read)
        _print(
            "\n".join(
                [
                    f"[upcycle] {self.dense_checkpoint} → {shape} on {len(reports)} rank(s)",
                    f"[upcycle]   tensors mapped    {len(tensors)} dense → "
                    f"{sum(r.shards for r in reports)} shards",
                    f"[upcycle]   bytes read        {_size(sum(r.bytes_read for r in reports))} in "
                    f"all, at most {_size(most.bytes_read)} a rank",
                    f"[upcycle]   time              {max(r.seconds for r in reports):.2f} s",
                    f"[upcycle]   peak memory       "
                    f"{_size(max(r.peak_resident_bytes for r in reports))} resident a rank",
                    f"[upcycle]   step 0            {upcycling.exactness()}",
                ]
            )
        )


def _raise_on_all_ranks(error: Exception | None) -> None:
    """Raise everywhere, after a line of its own on every rank.

    The launcher may end the other ranks before their tracebacks are out.
    """
    try:
        raise_on_all_ranks(error)
    except UpcyclingError as shared:
        rank = torch.distributed.get_rank()
        print(f"[upcycle] rank {rank}: {shared}", file=sys.stderr, flush=True)
        raise


def _gather(report: LoadReport) -> list[LoadReport]:
    reports: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(reports, report)
    return reports


def _print(text: str) -> None:
    if is_global_rank_zero():
        print(text, flush=True)


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

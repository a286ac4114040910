"""Lightning callbacks that bring about what a test wants to see survived."""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning import io

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class StopAfter(pl.Callback, io.IOMixin):
    """End the training after some steps, as if there were no more."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


class Hang(pl.Callback, io.IOMixin):
    """Do not begin a step; a process that rank 0 has forked would outlive it."""

    def __init__(self, step: int, says: str) -> None:
        self.step, self.says = step, says

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step + 1 == self.step:
            if os.environ["RANK"] == "0" and os.fork() != 0:
                Path(self.says).touch()
            while True:
                time.sleep(60)


class ShortData(pl.Callback, io.IOMixin):
    """Leave out all samples but the first."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def on_fit_start(self, trainer: pl.Trainer, *_: Any) -> None:
        data = trainer.datamodule
        data._train_ds = torch.utils.data.Subset(data._train_ds, range(self.samples))


class SayRates(pl.Callback, io.IOMixin):
    """Print what each step is made with: learning rate, weight decay, betas."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        groups = trainer.optimizers[0].param_groups
        decay = max(group["weight_decay"] for group in groups)
        group = groups[0]
        print(f"[rates] {group['lr']:.8g} {decay:g} {tuple(group['betas'])}", flush=True)


class FullDisk(pl.Callback, io.IOMixin):
    """Let no file grow beyond a size, from the saving of a step on; until the run has failed.

    The processes that a rank starts to write inherit it.
    """

    def __init__(self, step: int, size: int) -> None:
        self.step, self.size = step, size

    def setup(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "os.mkdir" and str(arguments[0]).endswith("/weights"):
                self._limit(self.size if trainer.global_step >= self.step else None)

        sys.addaudithook(hook)

    def on_exception(self, *_: Any) -> None:
        self._limit(None)

    def _limit(self, size: int | None) -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


class KillAtChange(pl.Callback, io.IOMixin):
    """Kill all ranks before rank 0 makes its n-th change in the directory of checkpoints.

    The changes that come before it are printed.
    """

    def __init__(self, change: int) -> None:
        self.change, self.count = change, 0

    def setup(self, *_: Any, **__: Any) -> None:
        if os.environ["RANK"] == "0":
            sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if event == "open" and isinstance(arguments[2], int):
            changes = bool(arguments[2] & WRITING)
        if changes and "/checkpoints/" in str(arguments[0]):
            self.count += 1
            if self.count == self.change:
                os.killpg(0, signal.SIGKILL)
            print(f"[change {self.count}] {event} {arguments[0]}", flush=True)


class LoseRank(pl.Callback, io.IOMixin):
    """Send one rank a signal while it upcycles (`reading`), or when it has (`gather`)."""

    def __init__(self, rank: int, signal: int, when: str) -> None:
        self.rank, self.signal, self.when = rank, signal, when

    def setup(self, *_: Any, **__: Any) -> None:
        if int(os.environ["RANK"]) != self.rank:
            return
        from nemo_upcycle.engine import upcycling
        from nemo_upcycle.engine.ranks import Ranks

        fill, gather = upcycling.fill, Ranks.gather

        def fill_and_end(*arguments: Any, **_: Any) -> Any:
            return fill(*arguments[:3], self._end)

        def end_in_gather(ranks: Ranks, value: Any) -> list[Any]:
            if isinstance(value, upcycling.LoadReport):
                self._end()
            return gather(ranks, value)

        replaced: dict[str, tuple[Any, str, Callable[..., Any]]] = {
            "reading": (upcycling, "fill", fill_and_end),
            "gather": (Ranks, "gather", end_in_gather),
        }
        setattr(*replaced[self.when])

    def _end(self, *_: Any) -> None:
        os.kill(os.getpid(), self.signal)

"""Progress of long work, and sizes as people read them."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Progress = Callable[..., None]
"""Told what is done, what there is in all, and a word about it if there is one."""

SECONDS_BETWEEN_LINES = 5.0
"""How often a log, which is no terminal, gets a line."""


def no_progress(done: int, total: int, note: str = "") -> None:
    """Show nothing."""


def size(count: float) -> str:
    """Return a number of bytes, such as `3.25 MiB`."""
    return scaled(count, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def scaled(count: float, base: int, units: Sequence[str], precise: bool = False) -> str:
    """Return a number in the largest unit of which there is one, each `base` times the last."""
    power = 0
    while count >= base and power < len(units) - 1:
        count, power = count / base, power + 1
    decimals = 2 if precise or count < 10 else 1 if count < 100 else 0
    decimals = 0 if power == 0 else decimals
    return f"{count:.{decimals}f}{units[power]}"


@contextmanager
def progress(label: str, active: bool = True, in_bytes: bool = False) -> Iterator[Progress]:
    """Show a bar on a terminal, a line now and then in a log; on standard error.

    Args:
        label: What the work is called.
        active: Whether this process shows anything: of a job's ranks one does.
        in_bytes: Whether what is counted is bytes.
    """
    if not active:
        yield no_progress
    elif not sys.stderr.isatty():
        yield _lines(label, in_bytes)
    else:
        with _bar(label, in_bytes) as show:
            yield show


@contextmanager
def _bar(label: str, in_bytes: bool) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    what = (DownloadColumn(binary_units=True), TransferSpeedColumn()) if in_bytes else ()
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), TaskProgressColumn(), *what, TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None)

        def show(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, description=f"{label} {note}".strip())

        yield show


def _lines(label: str, in_bytes: bool) -> Progress:
    started = last = time.monotonic()

    def show(done: int, total: int, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > SECONDS_BETWEEN_LINES and done:
            last = now
            seconds = now - started
            speed = f"{size(done / seconds)}/s" if in_bytes else ""
            left = f"{seconds * (total - done) / done:.0f} s left"
            words = ", ".join(filter(None, (f"{done / total:.0%}", note, speed, left)))
            print(f"{label}: {words}", file=sys.stderr, flush=True)

    return show

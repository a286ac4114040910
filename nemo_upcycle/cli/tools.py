"""What all commands share: errors of one line, progress."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from nemo_upcycle.errors import UpcyclingError

P = ParamSpec("P")
Directory = Annotated[Path, typer.Option("--out", "-o", help="Directory to write to.")]
Progress = Callable[..., None]
"""Told what is done, what there is in all, and a word about it if there is one."""

SECONDS_BETWEEN_LINES = 15.0


def one_line_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Make a command end with one line and exit code 1 on bad input, under `nemo` too."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except UpcyclingError as error:
            typer.secho(f"Error: {error}", err=True, fg=typer.colors.RED)
            raise typer.Exit(1) from None

    return wrapped


def last_checkpoint(source: Path) -> Path:
    """Return the checkpoint that is meant, and say which where a run's directory was given.

    Raises:
        UpcyclingError: See `resolve_trained`.
    """
    from nemo_upcycle.checkpoint.run_directory import resolve_trained

    found = resolve_trained(source)
    if found.name != source.name and source in found.parents and _is_first_rank():
        typer.echo(f"{source}: taking its last complete checkpoint, {found.name}", err=True)
    return found


def _is_first_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def progress(label: str) -> Iterator[Progress]:
    """Show a bar on a terminal, a line now and then in a log."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(label)
        return
    with Bar(console=console) as bar:
        task = bar.add_task(label, total=None)

        def show(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, description=f"{label} {note}".strip())

        yield show


def _lines(label: str) -> Progress:
    started = last = time.monotonic()

    def show(done: int, total: int, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > SECONDS_BETWEEN_LINES and done:
            last = now
            left = (now - started) * (total - done) / done
            words = [f"{done / total:.0%}", *filter(None, [note]), f"{left:.0f} s left"]
            typer.echo(f"{label}: {', '.join(words)}", err=True)

    return show

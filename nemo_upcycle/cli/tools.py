"""What all commands share: errors of one line, the checkpoints that were taken."""

import errno
import json
import os
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from nemo_upcycle.engine.launch import is_first_rank
from nemo_upcycle.errors import UpcyclingError, listing
from nemo_upcycle.files import check_writable
from nemo_upcycle.pictures import PICTURES

P = ParamSpec("P")
Directory = Annotated[Path, typer.Option("--out", "-o", help="Directory to write to.")]

ERRORS = "NEMO_UPCYCLE_ERRORS"
"""Where set: the directory in which each rank leaves what went wrong, to be said once."""

TAKEN = "NEMO_UPCYCLE_TAKEN"
"""Where set: the checkpoints that the first process has taken of runs, for the ranks it starts."""

_OF_THE_MACHINE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.ESTALE, errno.EMFILE, errno.ENFILE),
}
"""What files and disks do to a program that is right."""


_EXTRAS = {
    **dict.fromkeys(("nemo", "nemo_run", "lightning", "fiddle"), "nemo"),
    **dict.fromkeys(("matplotlib", "scipy"), "demo"),
    "lm_eval": "eval",
}
"""Packages that not everybody needs, and the extra that brings each."""


def one_line_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Make a command end with one line and exit code 1 on bad input, under `nemo` too.

    So do errors of files and disks; an interrupt ends it with one line and 130. A fault of the
    program keeps its traceback.
    """

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except UpcyclingError as error:
            _report_error(str(error))
            raise typer.Exit(1) from None
        except OSError as error:
            if error.errno not in _OF_THE_MACHINE:
                raise
            where = f"{error.filename}: " if error.filename else ""
            _report_error(f"{where}{error.strerror}. Check the path, the permissions and the disk.")
            raise typer.Exit(1) from None
        except ModuleNotFoundError as error:
            package = str(error.name).partition(".")[0]
            if package not in _EXTRAS:
                raise
            _report_error(
                f"{package} is not installed: pip install 'nemo-upcycle[{_EXTRAS[package]}]'."
            )
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            _report_error("interrupted.")
            raise typer.Exit(130) from None

    return wrapped


def _report_error(message: str) -> None:
    if directory := os.environ.get(ERRORS):
        (Path(directory) / os.environ["RANK"]).write_text(message)
    else:
        typer.secho(f"Error: {message}", err=True, fg=typer.colors.RED)


def at_least(name: str, value: float | None, least: float) -> None:
    """Check a number that an option was given.

    Raises:
        UpcyclingError: It is too small.
    """
    if value is not None and value < least:
        raise UpcyclingError(f"{name} is {value:g}; expected {least:g} or more.")


def check_file_writable(out: Path) -> None:
    """Check before the work that a file can be written.

    Raises:
        UpcyclingError: It cannot.
    """
    if out.is_dir():
        raise UpcyclingError(f"{out} is a directory; expected a file to write.")
    check_writable(out.parent)


def check_picture(out: Path) -> None:
    """Check before the work that a picture can be written.

    Raises:
        UpcyclingError: It cannot, or its ending says no format.
    """
    if out.suffix.lower() not in PICTURES:
        raise UpcyclingError(f"{out} has no picture's ending; expected {', '.join(PICTURES)}.")
    check_file_writable(out)


def one_of(checkpoints: Sequence[Path]) -> Path:
    """Return the one checkpoint that was given.

    Raises:
        UpcyclingError: There are several: a pattern of the shell's has found them.
    """
    if len(checkpoints) > 1:
        raise UpcyclingError(
            f"{len(checkpoints)} checkpoints were given: {listing(list(map(str, checkpoints)))}; "
            "expected one. The directory of a run stands for its last complete checkpoint."
        )
    return checkpoints[0]


_taken: dict[str, str] = {}


def last_checkpoint(source: Path) -> Path:
    """Return the checkpoint that is meant, and say which where a run's directory was given.

    Raises:
        UpcyclingError: See `resolve_trained`.
    """
    from nemo_upcycle.checkpoint.run_directory import resolve_trained

    taken = json.loads(os.environ.get(TAKEN, "{}"))
    if str(source) in taken:
        return Path(taken[str(source)])
    checkpoint = resolve_trained(source)
    if checkpoint.name != source.name and source in checkpoint.parents:
        _taken[str(source)] = str(checkpoint)
        note(f"{source}: taking its last complete checkpoint, {checkpoint.name}")
    return checkpoint


def note(text: str) -> None:
    """Say what the user did not ask for, once."""
    if is_first_rank() and TAKEN not in os.environ:
        typer.echo(text, err=True)


def hand_over() -> None:
    """Tell the ranks that this process starts which checkpoints are meant; a run may go on."""
    os.environ[TAKEN] = json.dumps(_taken)

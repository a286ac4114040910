"""Shared by all commands: one-line errors, checks of arguments, the resolved checkpoints."""

import errno
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from nemo_upcycle.cli.noise import hushed
from nemo_upcycle.engine.launch import is_first_rank
from nemo_upcycle.errors import UpcyclingError, listing
from nemo_upcycle.files import check_writable
from nemo_upcycle.pictures import PICTURES

P = ParamSpec("P")
Directory = Annotated[Path, typer.Option("--out", "-o", help="Directory to write to.")]

ERRORS = "NEMO_UPCYCLE_ERRORS"
"""If set: the directory where each rank writes its error, which is then printed once."""

TAKEN = "NEMO_UPCYCLE_TAKEN"
"""If set: the checkpoints that the first process chose for runs' directories, as JSON."""

_OF_THE_MACHINE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.ESTALE, errno.EMFILE, errno.ENFILE),
}
"""Errors of files and disks, not of the program."""


_EXTRAS = {
    **dict.fromkeys(("nemo", "nemo_run", "lightning", "fiddle"), "nemo"),
    **dict.fromkeys(("matplotlib", "scipy"), "demo"),
    "lm_eval": "eval",
}
"""Optional packages, and the extra that installs each."""


def one_line_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Make a command end with one line and exit code 1 on bad input, also under `nemo`.

    Errors of files and disks end the command in the same way; an interrupt, with one line and exit
    code 130. A bug of the program keeps the traceback. The noise of libraries is hidden.
    """

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with hushed():
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
    """Check the number given to an option.

    Raises:
        UpcyclingError: The number is too small.
    """
    if value is not None and value < least:
        raise UpcyclingError(f"{name} is {value:g}; expected {least:g} or more.")


def check_file_writable(out: Path) -> None:
    """Check before the work that a file can be written.

    Raises:
        UpcyclingError: The file cannot be written.
    """
    if out.is_dir():
        raise UpcyclingError(f"{out} is a directory; expected a file to write.")
    check_writable(out.parent)


def check_picture(out: Path) -> None:
    """Check before the work that a figure can be written.

    Raises:
        UpcyclingError: The file cannot be written, or its suffix names no supported format.
    """
    if out.suffix.lower() not in PICTURES:
        raise UpcyclingError(f"{out} has no suffix of a figure; expected {', '.join(PICTURES)}.")
    check_file_writable(out)


def one_of(checkpoints: Sequence[Path]) -> Path:
    """Return the only checkpoint of the argument.

    Raises:
        UpcyclingError: There are several, because a shell pattern matched several.
    """
    if len(checkpoints) > 1:
        raise UpcyclingError(
            f"{len(checkpoints)} checkpoints were given: {listing(list(map(str, checkpoints)))}; "
            "expected one. A run's directory means the run's last complete checkpoint."
        )
    return checkpoints[0]


def show_lines(lines: Mapping[str, str], notes: Iterable[str]) -> None:
    """Print facts of a plan, a line each, and notes for the user."""
    for name, text in lines.items():
        typer.echo(f"  {name:<8} {text}")
    for note in notes:
        typer.echo(f"Note: {note}.")


def before_serving(model_type: str) -> None:
    """Say where it is written which engines compute an architecture otherwise than transformers."""
    if model_type != "mixtral":
        typer.echo(
            "Note: not every engine computes this architecture as transformers does: see "
            "docs/serving.md before you serve the model."
        )


_taken: dict[str, str] = {}


def last_checkpoint(source: Path) -> Path:
    """Return the checkpoint; for a run's directory, the last complete one, and print its name.

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
    """Print a remark once, on the first rank."""
    if is_first_rank() and TAKEN not in os.environ:
        typer.echo(text, err=True)


def hand_over() -> None:
    """Pass the chosen checkpoints to the ranks that this process starts."""
    os.environ[TAKEN] = json.dumps(_taken)

"""Entry points of NeMo-Run: recipes, executors and the commands of `nemo upcycle`."""

import logging
import re
import sys
import traceback
from functools import wraps
from pathlib import Path
from typing import Any

from nemo_upcycle.cli import noise

if Path(sys.argv[0]).name in ("nemo", "nemorun", "__main__.py"):  # and not a rank, or a notebook
    noise.hush(records=sys.argv[1:2] == ["upcycle"])

import nemo_run as run
import typer
from nemo_run.cli import cli_parser
from nemo_run.cli.api import Entrypoint, RunContext
from nemo_run.cli.cli_parser import CLIException

from nemo_upcycle.cli import app, job_output
from nemo_upcycle.cli.interrupt import listen
from nemo_upcycle.errors import UpcyclingError

try:
    from nemo_upcycle_recipes import any_model, executors, llama_tiny, upcycled, upcycled_gpt

    import nemo_upcycle.nemo  # noqa: F401  checks versions, before recipes import NeMo
except UpcyclingError as error:  # a version; NeMo-Run would say only that there is no such command
    if sys.argv[1:2] not in (["llm"], ["upcycle"]):
        raise
    print(f"Error: {error}", file=sys.__stderr__)  # what is written while importing is hidden
    raise SystemExit(1) from None

__all__ = ["any_model", "executors", "llama_tiny", "upcycled", "upcycled_gpt"]


class Commands(Entrypoint):
    """The commands of `nemo-upcycle`, under `nemo upcycle`."""

    def cli(self, parent: typer.Typer) -> None:
        """Add the commands to NeMo-Run's `upcycle` group."""
        parent.info.help = app.info.help
        parent.registered_commands += app.registered_commands
        parent.registered_groups += app.registered_groups


@run.cli.entrypoint(namespace="upcycle", entrypoint_cls=Commands)
def commands() -> None:
    """Stand for all commands; NeMo-Run gets the commands from `Commands.cli`."""


def _with_one_line_errors(execute: Any) -> Any:
    """Make NeMo-Run report a user error in one line.

    NeMo-Run calls every error unexpected, adds Fiddle's build path or the whole configuration, and
    prints nothing for an assertion without a message.
    """

    @wraps(execute)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return execute(*args, **kwargs)
        except (UpcyclingError, CLIException) as error:
            typer.secho(f"Error: {_one_line(error)}", err=True, fg=typer.colors.RED)
        except Exception as error:
            if str(error).strip():
                raise
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise RuntimeError(
                f"{type(error).__name__} at {place.filename}:{place.lineno}: {place.line}"
            ) from error
        # NeMo-Run treats typer's own exit as an unexpected error too.
        raise SystemExit(1)

    return wrapped


def _one_line(error: Exception) -> str:
    """Return an error's cause in one line."""
    if isinstance(error, CLIException):
        if isinstance(error.__cause__, UpcyclingError):
            return _one_line(error.__cause__)
        what = re.split(r": No matching type| exists for <| \(Argument: |\n", str(error))[0]
        what = re.sub(r"^Invalid argument: |^.*(?=Failed to parse)", "", what)
        if "Positional argument" in what:  # NeMo-Run splits values at commas
            what = (
                f"{what}: {error.arg!r}. A factory's arguments are KEY=VALUE, cut at commas; "
                "several values of one are separated by semicolons: dense_checkpoint='DIR1; DIR2'"
            )
        given = f"{error.arg}: " if re.fullmatch(r"[\w.]+=.*", error.arg) else ""
        return f"{given}{what}. --dryrun shows the names and values that there are."
    # Fiddle adds the position in the configuration.
    return str(getattr(error, "proxy_base_exception", error))


def _knowing_the_executor(execute: Any) -> Any:
    """Let factories know the executor, which NeMo-Run has parsed before.

    What NeMo-Run says about a local job is hidden.
    """

    @wraps(execute)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with executors.launching(self.executor), job_output.quiet_launch(self):
            return execute(self, *args, **kwargs)

    return wrapped


logging.getLogger(cli_parser.__name__).setLevel(logging.CRITICAL)  # repeats the error, at length
RunContext._execute_task = _knowing_the_executor(RunContext._execute_task)
RunContext.cli_execute = _with_one_line_errors(RunContext.cli_execute)
listen()
job_output.listen()

"""A command as a job of NeMo-Run: `run.executor=slurm run.executor.nodes=2`, as with a recipe."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    import nemo_run as run

_EXECUTOR = "run.executor"


def check_settings(settings: Sequence[str]) -> None:
    """Check words such as `run.executor=slurm` and `run.executor.nodes=2`.

    Raises:
        UpcyclingError: A word is another one, or no executor is named.
    """
    for word in settings:
        if "=" not in word or not word.startswith((f"{_EXECUTOR}=", f"{_EXECUTOR}.")):
            raise UpcyclingError(
                f"{word!r} is no option; expected {_EXECUTOR}=NAME or {_EXECUTOR}.KEY=VALUE."
            )
    if not any(word.startswith(f"{_EXECUTOR}=") for word in settings):
        raise UpcyclingError(f"No executor is named; expected {_EXECUTOR}=slurm, for example.")


def submit(command: str, settings: Sequence[str], out: Path) -> int:
    """Run a command on the ranks of an executor, wait, and return its exit code.

    Args:
        command: The command, which the arguments of this process follow.
        settings: See `check_settings`.
        out: Directory where the command writes `check.json`, seen from here.
    """
    written = out / f"{command}.json"
    written.unlink(missing_ok=True)
    import nemo_run as run

    with run.Experiment(command) as experiment:
        add_job(experiment, command, settings, out)
        experiment.run(tail_logs=True)
    # NeMo-Run exits with 0 also after a failed job.
    return 0 if written.is_file() and json.loads(written.read_text())["passed"] else 1


def add_job(experiment: "run.Experiment", command: str, settings: Sequence[str], out: Path) -> None:
    """Add the command as a job, with the arguments of this process; see `submit`."""
    import nemo_run as run

    place = sys.argv.index(command)
    own = [word for word in sys.argv[place + 1 :] if word not in settings]
    # A relative directory would be one of the job's.
    arguments = [command, *own, "--out", str(out.resolve())]
    job = run.Script("nemo_upcycle.cli", args=arguments, entrypoint="python", m=True)
    experiment.add(job, executor=_executor(settings), name=command)


def _executor(settings: Sequence[str]) -> Any:
    """Return the executor of the settings; a failed job is not started again."""
    import fiddle
    import nemo_run as run
    from nemo_upcycle_recipes import executors

    assert executors  # whose import registers them
    words = [word.removeprefix(_EXECUTOR) for word in settings]
    (name,) = [word.removeprefix("=") for word in words if word.startswith("=")]
    fields = [word.removeprefix(".") for word in words if word.startswith(".")]
    factory = run.cli.resolve_factory(run.LocalExecutor | run.SlurmExecutor, name)
    executor = fiddle.build(fiddle.build(run.cli.parse_cli_args(factory, fields))())
    executor.retries = 0
    return executor

"""The name of a run: a directory, and what its checkpoints are called."""

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.files import name_problem

MAX_BYTES = 120
"""Of a part of a name: a checkpoint's has some 100 more, and a file system's end at 255."""


def check_name(name: str) -> None:
    """Check that a run's directory can have this name.

    A name may have parts, as in `group/run1`, spaces, and characters of any language.

    Raises:
        UpcyclingError: It is empty or too long, leads out of the directory of the runs, or has
            characters that no file or no log line can have.
    """
    problem = _problem(name)
    if problem is not None:
        raise UpcyclingError(
            f"The run's name is {name!r}, {problem}; expected a name such as e8t2 or group/run1. "
            "The directory of the runs is given by dir."
        )


def checkpoint_prefix(name: str) -> str:
    """Return how a run's checkpoints begin: Lightning fills in what stands in braces."""
    return name.rpartition("/")[2]


def _problem(name: str) -> str | None:
    if name.startswith("/"):
        return "an absolute path"
    if name.startswith("~"):
        return "which looks like a home directory"
    parts = name.split("/")
    if not all(part.strip() for part in parts):
        return "empty, or with an empty part"
    problems = (name_problem(part, MAX_BYTES, forbidden="{}\\") for part in parts)
    return next(filter(None, problems), None)

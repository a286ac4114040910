"""The name of a run: a directory, and the prefix of the run's checkpoints."""

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.files import name_problem

MAX_BYTES = 120
"""Maximum length per part of a name; checkpoints add about 100 bytes, file systems allow 255."""


def check_name(name: str) -> None:
    """Check that a name is valid for a run's directory.

    A name may have several parts, as in `group/run1`, spaces, and characters of any language.

    Raises:
        UpcyclingError: The name is empty or too long, leads out of the directory of the runs, or
            has characters that are not allowed in file names or log lines.
    """
    problem = _problem(name)
    if problem is not None:
        raise UpcyclingError(
            f"The run's name is {name!r}, {problem}; expected a name such as e8t2 or group/run1. "
            "The directory of the runs is given by dir."
        )


def checkpoint_prefix(name: str) -> str:
    """Return the prefix of a run's checkpoints; Lightning substitutes expressions in braces."""
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

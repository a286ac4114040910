"""Checks of the options of initializers."""

from nemo_upcycle.config.upcycling import LARGEST_NUMBER
from nemo_upcycle.errors import UpcyclingError


def check_fraction(name: str, option: str, value: float) -> None:
    """Check that an option is a number from 0 to 1."""
    if not _is_number(value) or not 0 <= value <= 1:
        raise UpcyclingError(f"{name}: {option} is {value!r}; expected a number from 0 to 1.")


def check_positive(name: str, option: str, value: float) -> None:
    """Check that an option is a finite number of 0 or more."""
    if not _is_number(value) or not 0 <= value <= LARGEST_NUMBER:
        raise UpcyclingError(
            f"{name}: {option} is {value!r}; expected a number of 0 or more, up to "
            f"{LARGEST_NUMBER:g}."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

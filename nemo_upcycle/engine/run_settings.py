"""Settings of a run, compared with those of the command that resumes the run."""

from collections.abc import Collection, Mapping
from typing import Any

from nemo_upcycle.errors import UpcyclingError, listing

ROUTER_WARM_UP = "router_warmup_steps"
"""First steps in which only the routers are trained, 0 for none.

Fixed for a run: Adam's moments of parameters that have been trained would move the parameters while
they are frozen.
"""

_OF_OLDER_VERSIONS: Mapping[str, Any] = {ROUTER_WARM_UP: 0}
"""Values of settings that older versions did not have."""


def changes(
    before: Mapping[str, Any], now: Mapping[str, Any], run: str, fixed: Collection[str]
) -> list[str]:
    """Return the settings that a resume changes, one line each.

    Args:
        before: Settings in the run's record.
        now: Settings of the command.
        run: Path of the run, for the error message.
        fixed: Names of the settings that may not change.

    Raises:
        UpcyclingError: A fixed setting has changed.
    """
    before = {**_OF_OLDER_VERSIONS, **before}
    # Settings added by another version exist on only one side.
    names = sorted(before.keys() & now.keys())
    changed = [name for name in names if _compared(before[name]) != _compared(now[name])]
    if refused := [name for name in changed if name in fixed]:
        was = listing([f"{name}={_shown(before[name])}" for name in refused])
        given = listing([f"{name}={_shown(now[name])}" for name in refused])
        raise UpcyclingError(
            f"The run in {run} was trained with {was}; now {given} is given. A run goes on as it "
            "began: give the first values, or another name for a new run."
        )
    return [f"{name} {_change(before[name], now[name])}" for name in changed]


def _compared(value: Any) -> Any:
    """Return the part of a value to compare: of a dataset's [weight, prefix, content] no prefix."""
    if isinstance(value, list | tuple):
        is_dataset = len(value) == 3 and isinstance(value[1], str) and value[2] is not None
        kept = (value[0], value[2]) if is_dataset else value
        return [_compared(each) for each in kept]
    return value


def _change(before: Any, now: Any) -> str:
    if _shown(before) == _shown(now):
        return f"{_shown(now)}: the content has changed since"
    return f"{_shown(before)} → {_shown(now)}"


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple):
        parts = [part for weight, prefix, _ in value for part in (weight, prefix)]
        return " ".join(str(part) for part in parts if part is not None)
    return str(value)

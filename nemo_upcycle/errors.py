"""The one error that users meet."""


class UpcyclingError(ValueError):
    """Bad input: the message says what was found, what was expected and what to do."""


def listing(names: list[str], limit: int = 8) -> str:
    """Join names for an error message, the first `limit` of them and a count of the rest."""
    shown = ", ".join(sorted(names)[:limit])
    return shown if len(names) <= limit else f"{shown} … and {len(names) - limit} more"

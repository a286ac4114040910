"""What all pictures need."""

from nemo_upcycle.errors import UpcyclingError


def require_matplotlib() -> None:
    """Check that a picture can be drawn.

    Raises:
        UpcyclingError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UpcyclingError(
            "The picture needs matplotlib, which is not installed: pip install 'nemo-upcycle[demo]'"
        ) from None

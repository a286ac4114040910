"""What all pictures need."""

import io
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.files import write_whole

PICTURES = (".png", ".svg", ".pdf")
"""Endings of the formats that are written."""

BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
"""Okabe and Ito's colors, distinguishable with every form of color vision."""


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


def write_picture(figure: Any, path: Path, dpi: int) -> None:
    """Write a figure of matplotlib's, whole or not at all.

    Args:
        figure: The figure.
        path: The file; its ending says the format.
        dpi: Points of an inch.
    """
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.lower().removeprefix("."), dpi=dpi)
    write_whole(path, content.getvalue())

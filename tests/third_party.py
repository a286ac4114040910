"""A package of somebody else's that brings an expert initialiser."""

from pathlib import Path


def install_flip(directory: Path) -> Path:
    """Write a package with an initialiser, as an installer would."""
    (directory / "flipping.py").write_text(
        "from nemo_upcycle.initializers import Initializer, Neurons, register\n\n\n"
        "@register('flip')\n"
        "def flip(fraction: float = 0.5) -> Initializer:\n"
        "    def initialize(neurons: Neurons) -> None:\n"
        "        neurons.values['down'][neurons.choose(fraction)] *= -1\n\n"
        "    return initialize\n"
    )
    info = directory / "flipping-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flipping\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nemo_upcycle.initializers]\nflip = flipping:flip\n")
    return directory

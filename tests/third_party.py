"""Packages of somebody else's that bring an initializer."""

from pathlib import Path


def install_flip(directory: Path) -> Path:
    """Write a package with an initializer of experts, as an installer would."""
    return _install(
        directory,
        "flipping",
        "nemo_upcycle.initializers",
        "flip",
        "from nemo_upcycle.initializers import Initializer, Neurons, register\n\n\n"
        "@register('flip')\n"
        "def flip(fraction: float = 0.5) -> Initializer:\n"
        "    def initialize(neurons: Neurons) -> None:\n"
        "        neurons.values['down'][neurons.choose(fraction)] *= -1\n\n"
        "    return initialize\n",
    )


def install_orthogonal(directory: Path) -> Path:
    """Write a package with an initializer of routers, as an installer would."""
    return _install(
        directory,
        "orthogonals",
        "nemo_upcycle.router_initializers",
        "orthogonal",
        "import numpy as np\n\n"
        "from nemo_upcycle.initializers import RouterInitializer, RouterRows, Values, "
        "register_router\n\n\n"
        "@register_router('orthogonal')\n"
        "def orthogonal(scale: float = 1.0) -> RouterInitializer:\n"
        "    def initialize(rows: RouterRows) -> Values:\n"
        "        return scale * np.linalg.qr(rows.normal().T)[0].T\n\n"
        "    return initialize\n",
    )


def _install(directory: Path, module: str, group: str, name: str, source: str) -> Path:
    (directory / f"{module}.py").write_text(source)
    info = directory / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:{name}\n")
    return directory

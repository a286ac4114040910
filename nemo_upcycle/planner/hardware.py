"""GPUs and networks as short YAML files, from the package or the user."""

from dataclasses import dataclass, fields
from math import inf
from pathlib import Path

from nemo_upcycle import settings
from nemo_upcycle.errors import UpcyclingError

SHIPPED = Path(__file__).parent / "hardware"


@dataclass(frozen=True)
class Hardware:
    """A kind of GPU and its nodes, by data sheet.

    Attributes:
        name: Part of the device's name in CUDA.
        peak_tflops: Dense bf16 TFLOP/s.
        memory_gib: GiB per GPU.
        memory_bandwidth: GB/s of a GPU's memory.
        gpus_per_node: GPUs per node of the scheduler.
        nvlink_domain: GPUs connected by NVLink; more than a node in rack-scale systems.
        nvlink_bandwidth: GB/s per GPU, in each direction.
        network_bandwidth: GB/s per GPU beyond the NVLink domain, in each direction.
        storage_bandwidth: GB/s per node, reading from the file system.
        storage_total: GB/s of all nodes together, reading.
        measured: The fields that were measured on these nodes, separated by spaces; the others are
            those of a data sheet.
        host_slowness: Time that the host takes to launch kernels, over that of the hosts in the
            published runs (DGX H100).
        host_memory_gib: GiB of a node's own memory.
        host_memory_bandwidth: GB/s of a node's own memory.
        host_link_bandwidth: GB/s per GPU to and from the node's memory, in each direction.
    """

    name: str
    peak_tflops: float
    memory_gib: float
    memory_bandwidth: float
    gpus_per_node: int
    nvlink_domain: int
    nvlink_bandwidth: float
    network_bandwidth: float
    storage_bandwidth: float
    storage_total: float
    host_slowness: float = 1.0
    # Where a file says nothing: a small node with PCIe 4.
    host_memory_gib: float = 1000.0
    host_memory_bandwidth: float = 200.0
    host_link_bandwidth: float = 25.0
    measured: str = ""

    def __post_init__(self) -> None:
        known = {field.name for field in fields(self)} - {"name", "measured"}
        if unknown := sorted({*self.measured.split()} - known):
            raise UpcyclingError(
                f"measured has {unknown[0]!r}; expected names of: {', '.join(sorted(known))}."
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is not str and not 0 < value < inf:
                raise UpcyclingError(
                    f"{field.name} is {value}; expected more than 0, and a finite number."
                )


def measured_hardware(source: str) -> Hardware:
    """Read what `nemo-upcycle check` measured.

    Args:
        source: The file, or the directory that `check` wrote.

    Raises:
        UpcyclingError: There is no such file, or nothing in the file was measured.
    """
    path = Path(source).expanduser()
    path = path / "hardware.yaml" if path.is_dir() else path
    if not path.is_file():
        raise UpcyclingError(
            f"There is no {path}; expected the hardware.yaml that `nemo-upcycle check` writes on "
            "GPUs, or the directory with the file."
        )
    found = hardware(str(path))
    if not found.measured:
        raise UpcyclingError(
            f"{path} has no measured values; expected what `nemo-upcycle check` writes. "
            f"For hardware by its data sheet use --hardware {path}."
        )
    return found


def shipped() -> list[str]:
    """Return the names of the hardware in the package."""
    return settings.names_in(SHIPPED)


def hardware(source: str) -> Hardware:
    """Read a kind of hardware.

    Args:
        source: One of `shipped()`, or a YAML file with the fields of `Hardware`; with
            `base: h100` the file states only differences.

    Raises:
        UpcyclingError: There is no such hardware, or a field is missing, unknown or of the
            wrong type.
    """
    path = settings.find(source, SHIPPED, "hardware")
    return settings.read(Hardware, path, SHIPPED)


def device_hardware(device: str) -> Hardware | None:
    """Return the hardware in the package by the device name in CUDA; None if unknown."""
    known = [hardware(name) for name in shipped()]
    # Longest names first: GB200 is not B200.
    matching = (one for one in sorted(known, key=lambda one: -len(one.name)) if one.name in device)
    return next(matching, None)


def device_peak_tflops(device: str) -> float | None:
    """Return a GPU's bf16 peak by the device name in CUDA; None if unknown."""
    known = device_hardware(device)
    return None if known is None else known.peak_tflops

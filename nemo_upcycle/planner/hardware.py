"""What a GPU and its network can do: a short YAML, ours or a user's own."""

from dataclasses import dataclass, fields
from pathlib import Path

from nemo_upcycle import settings
from nemo_upcycle.errors import UpcyclingError

SHIPPED = Path(__file__).parent / "hardware"


@dataclass(frozen=True)
class Hardware:
    """A kind of GPU in its nodes, by data sheet.

    Attributes:
        name: Part of the device's name, as CUDA says it.
        peak_tflops: Dense bf16.
        memory_gib: Of a GPU.
        memory_bandwidth: GB/s of a GPU's memory.
        gpus_per_node: GPUs that one node of the scheduler has.
        nvlink_domain: GPUs that NVLink joins; more than a node's in racks.
        nvlink_bandwidth: GB/s of a GPU, each way.
        network_bandwidth: GB/s of a GPU beyond its domain, each way.
        storage_bandwidth: GB/s that a node reads of its file system.
        storage_total: GB/s that all nodes together read.
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

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "name" and not value > 0:
                raise UpcyclingError(f"{field.name} is {value}; expected more than 0.")


def shipped() -> list[str]:
    """Return the names of the hardware that the package knows."""
    return settings.names_in(SHIPPED)


def hardware(source: str) -> Hardware:
    """Read a kind of hardware.

    Args:
        source: One of `shipped()`, or a YAML file with the fields of `Hardware`; with
            `base: h100` it says only what differs.

    Raises:
        UpcyclingError: There is none, or a field is missing, unknown or not of its type.
    """
    path = settings.find(source, SHIPPED, "hardware")
    return settings.read(Hardware, path, SHIPPED)


def device_peak_tflops(device: str) -> float | None:
    """Return the bf16 peak of a GPU by the name that CUDA gives it, None where it is not known."""
    known = [hardware(name) for name in shipped()]
    # The longest first: GB200 is no B200.
    matching = (one for one in sorted(known, key=lambda one: -len(one.name)) if one.name in device)
    return next((one.peak_tflops for one in matching), None)

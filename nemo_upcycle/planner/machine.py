"""Time of an operation on given hardware: multiplications, memory traffic, collectives."""

from dataclasses import dataclass

from nemo_upcycle.planner.efficiency import Efficiency
from nemo_upcycle.planner.hardware import Hardware

GIGA = 1e9


@dataclass(frozen=True)
class Machine:
    """GPUs and networks at the speed that training reaches.

    Attributes:
        hardware: By data sheet.
        efficiency: Fractions of the data sheet that training reaches.
    """

    hardware: Hardware
    efficiency: Efficiency

    @property
    def nvlink(self) -> float:
        """Bytes/s per GPU inside an NVLink domain."""
        return self.hardware.nvlink_bandwidth * GIGA * self.efficiency.nvlink

    @property
    def network(self) -> float:
        """Bytes/s per GPU beyond the NVLink domain."""
        return self.hardware.network_bandwidth * GIGA * self.efficiency.network

    def product(self, m: float, n: float, k: float) -> float:
        """Return the time to multiply m×k by k×n; small matrices use the GPU poorly."""
        if not m:
            return 0.0
        filled = 1 + self.efficiency.tile * (1 / m + 1 / n + 1 / k)
        peak = self.hardware.peak_tflops * 1e12 * self.efficiency.gemm
        return 2 * m * n * k * filled / peak

    def attention(self, operations: float) -> float:
        """Return the time of fused attention."""
        return operations / (self.hardware.peak_tflops * 1e12 * self.efficiency.attention)

    def moved(self, size: float) -> float:
        """Return the time to read or write `size` bytes of memory."""
        return size / (self.hardware.memory_bandwidth * GIGA * self.efficiency.memory)

    def near(self, stride: int, ranks: int) -> int:
        """Return how many ranks of a group are in one NVLink domain.

        Args:
            stride: Distance between the group's ranks.
            ranks: Ranks in the group.
        """
        return max(1, min(ranks, self.hardware.nvlink_domain // stride))

    def collective(self, sent: float, stride: int, ranks: int) -> float:
        """Return the time of a ring: all-gather, reduce-scatter or sending to a neighbor.

        Args:
            sent: Bytes that each GPU sends.
            stride: Distance between the group's ranks.
            ranks: Ranks in the group.
        """
        if ranks == 1:
            return 0.0
        near = self.near(stride, ranks)
        # A ring enters each domain over as many network links as the group has ranks there.
        bandwidth = self.nvlink if near == ranks else min(self.nvlink, near * self.network)
        return sent / bandwidth + self.efficiency.latency

    def all_to_all(self, sent: float, stride: int, ranks: int) -> float:
        """Return the time of an all-to-all.

        Args:
            sent: Bytes per GPU, including the part that stays.
            stride: Distance between the group's ranks.
            ranks: Ranks in the group.
        """
        if ranks == 1:
            return 0.0
        near = self.near(stride, ranks)
        far = sent * (ranks - near) / ranks / self.network
        return max(far, sent * (near - 1) / ranks / self.nvlink) + self.efficiency.latency

    def deduplicated(self, sent: float, choices: int, stride: int, ranks: int) -> float:
        """Return the time of an all-to-all that sends a token once to each domain and each rank.

        Args:
            sent: Bytes per GPU, each token counted once.
            choices: Experts per token.
            stride: Distance between the group's ranks.
            ranks: Ranks in the group.

        Source: DeepEP (DeepSeek-AI): the network carries a token once per node, NVLink forwards.
        """
        if ranks == 1:
            return 0.0
        near = self.near(stride, ranks)
        domains = ranks / near
        network = self.hardware.network_bandwidth * GIGA * self.efficiency.deduplicated
        far = sent * distinct(domains, choices) * (domains - 1) / domains / network
        inside = sent * distinct(ranks, choices) * (near - 1) / near / self.nvlink
        return max(far, inside) + self.efficiency.latency


def distinct(places: float, choices: int) -> float:
    """Return how many of a number of places `choices` even, independent choices fall into."""
    return places * (1 - (1 - 1 / places) ** choices)

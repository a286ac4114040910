"""Results of checks: on one rank, of all ranks, and of the whole job."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from nemo_upcycle.engine.ranks import Ranks
from nemo_upcycle.errors import UpcyclingError

MAPPING_CHECKS = ("groups", "step 0", "export", "load elsewhere", "loss", "gradient norm")
"""Checks of every mapping, in order."""

KILLED_AND_RESUMED = "killed and resumed"
BANDWIDTH = "bandwidth"


@dataclass(frozen=True)
class Seen:
    """What one rank has found.

    Attributes:
        passed: Whether it is what is expected.
        found: What was found.
        expected: What was expected.
        distance: How far the two are apart, to choose the worst of all ranks.
        is_error: Whether the rank could not finish the check.
    """

    passed: bool
    found: str
    expected: str
    distance: float = 0.0
    is_error: bool = False


def near(found: float, expected: float, tolerance: float) -> Seen:
    """Compare two numbers by their relative difference."""
    distance = abs(found - expected) / abs(expected)
    return Seen(
        distance <= tolerance,
        f"{found:.8g} ({distance:.1e} apart)",
        f"{expected:.8g} as on one rank, at most {tolerance:.0e} apart",
        distance,
    )


@dataclass(frozen=True)
class Finding:
    """What all ranks together have found.

    Attributes:
        check: Name of the check.
        mapping: The parallel mapping, or what else was checked.
        passed: Whether all ranks have passed.
        found: What was found on the worst rank.
        expected: What was expected there.
        is_error: Whether a rank could not finish the check.
    """

    check: str
    mapping: str
    passed: bool
    found: str
    expected: str
    is_error: bool = False

    def __str__(self) -> str:
        return f"{self.mapping}: {self.check}: found {self.found}; expected {self.expected}"


def agreed(check: str, mapping: str, work: Callable[[], Seen], ranks: Ranks) -> Finding:
    """Do this rank's part of a check, and share the results; every rank must call this.

    Args:
        check: Name of the check.
        mapping: What is checked.
        work: This rank's part; an exception is a failure.
        ranks: The job's ranks, on a group that `work` does not use: a rank that has failed is
            already here while others are still at work.

    Returns:
        The same finding on all ranks.
    """
    try:
        seen = work()
    except Exception as error:  # also a bug of Megatron's: the table has to name the mapping
        kind = "" if isinstance(error, UpcyclingError) else f"{type(error).__name__}: "
        seen = Seen(False, kind + " ".join(str(error).split()), "no error", is_error=True)
    of_ranks = ranks.gather(seen)
    failed = [rank for rank, each in enumerate(of_ranks) if not each.passed]
    worst = max(failed or range(ranks.size), key=lambda rank: of_ranks[rank].distance)
    seen = of_ranks[worst]
    where = f"on rank {worst}: " if failed and len({each.found for each in of_ranks}) > 1 else ""
    is_error = any(each.is_error for each in of_ranks)
    return Finding(check, mapping, not failed, where + seen.found, seen.expected, is_error)


@dataclass(frozen=True)
class Bandwidth:
    """Measured bandwidth of a collective.

    Attributes:
        collective: Name of the collective.
        across_nodes: Whether its ranks are on different nodes, or all on one.
        ranks: Ranks of each group.
        over_network: Whether the groups are wider than an NVLink domain.
        measured: GB/s that each rank sends.
        planned: GB/s that the planner counts with; None if the hardware is unknown.
    """

    collective: str
    across_nodes: bool
    over_network: bool
    ranks: int
    measured: float
    planned: float | None = None


@dataclass
class Outcome:
    """All results of a job.

    Attributes:
        subject: The model that was checked.
        device: The device's name.
        ranks: Number of ranks.
        nodes: Number of nodes.
        findings: The results, in order.
        bandwidths: The measured bandwidths.
        hardware_file: The file with these bandwidths for the planner, if the hardware is known.
    """

    subject: str
    device: str
    ranks: int
    nodes: int
    findings: list[Finding] = field(default_factory=list)
    bandwidths: list[Bandwidth] = field(default_factory=list)
    hardware_file: str | None = None

    @property
    def failures(self) -> list[Finding]:
        """The findings that have failed."""
        return [finding for finding in self.findings if not finding.passed]

    @property
    def passed(self) -> bool:
        """Whether there is a result, and none has failed."""
        return bool(self.findings) and not self.failures

    def to_json(self) -> dict[str, Any]:
        """Return the results as plain data."""
        return {
            "passed": self.passed,
            "subject": self.subject,
            "device": self.device,
            "ranks": self.ranks,
            "nodes": self.nodes,
            "findings": [vars(finding) for finding in self.findings],
            "bandwidths": [vars(bandwidth) for bandwidth in self.bandwidths],
            "hardware_file": self.hardware_file,
        }

    def by_mapping(self) -> Iterator[tuple[str, dict[str, Finding]]]:
        """Yield each mapping with its findings by check."""
        for mapping in _unique(finding.mapping for finding in self.findings):
            found = {f.check: f for f in self.findings if f.mapping == mapping}
            if found.keys() & set(MAPPING_CHECKS):
                yield mapping, found


def _unique(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))

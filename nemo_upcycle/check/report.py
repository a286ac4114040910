"""The results of a check as tables and text."""

from collections.abc import Iterator

from rich.table import Table

from nemo_upcycle.check.findings import MAPPING_CHECKS, Bandwidth, Finding, Outcome

_MARKS = {None: "·", True: "[green]✓[/green]", False: "[red]✗[/red]"}
"""Not run, passed, failed."""

_HEADS = {"load elsewhere": "load", "gradient norm": "norm"}
"""Shorter names of checks, so that the table fits 80 columns."""


def mark(finding: Finding | None) -> str:
    """Return a cell of the table."""
    return _MARKS[None if finding is None else finding.passed]


def tables(outcome: Outcome) -> Iterator[Table]:
    """Yield the tables: mappings, and bandwidths if there are any."""
    yield _mappings(outcome)
    if outcome.bandwidths:
        yield _bandwidths(outcome.bandwidths)


def lines(outcome: Outcome) -> Iterator[str]:
    """Yield what is said below the tables: other checks, each failure, the verdict."""
    for finding in outcome.findings:
        if finding.check not in MAPPING_CHECKS and finding.passed:
            yield f"✓ {finding.check}: {finding.mapping}: {finding.found}"
    for finding in outcome.failures:
        yield f"✗ {finding}"
    count, failed = len(outcome.findings), len(outcome.failures)
    verdict = f"{failed} of {count} checks failed" if failed else f"all {count} checks passed"
    yield f"{verdict} on {outcome.ranks} ranks ({outcome.device})"


def _mappings(outcome: Outcome) -> Table:
    table = Table(title=outcome.subject, title_justify="left")
    table.add_column("mapping", no_wrap=True)
    for check in MAPPING_CHECKS:
        table.add_column(_HEADS.get(check, check), justify="center")
    for mapping, found in outcome.by_mapping():
        table.add_row(mapping, *(mark(found.get(check)) for check in MAPPING_CHECKS))
    return table


def _bandwidths(bandwidths: list[Bandwidth]) -> Table:
    table = Table(title="Bandwidth per rank, GB/s", title_justify="left")
    for name in ("collective", "ranks", "where"):
        table.add_column(name, justify="right" if name == "ranks" else "left")
    for name in ("measured", "the planner's"):
        table.add_column(name, justify="right")
    for each in bandwidths:
        table.add_row(
            each.collective,
            str(each.ranks),
            "across nodes" if each.across_nodes else "inside a node",
            f"{each.measured:.3g}",
            "" if each.planned is None else f"{each.planned:.3g}",
        )
    return table

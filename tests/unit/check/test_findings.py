"""Findings, and how they are shown."""

import io
import json

from rich.console import Console

from nemo_upcycle.check.findings import Bandwidth, Finding, Outcome, near
from nemo_upcycle.check.report import lines, tables

FOUND = [
    Finding("groups", "EP2", True, "the same", "the groups"),
    Finding("step 0", "EP2", False, "on rank 1: logits 0.3 apart", "at most 1e-05"),
    Finding("killed and resumed", "EP2", True, "losses", "losses"),
]


def outcome(*findings: Finding) -> Outcome:
    bandwidth = Bandwidth("all-reduce", False, False, 2, 0.5, 425.7)
    return Outcome("a tiny Llama", "CPU", 2, 1, list(findings), [bandwidth])


def shown(found: Outcome) -> str:
    console = Console(file=io.StringIO(), width=80)
    for table in tables(found):
        console.print(table)
    return console.file.getvalue() + "\n".join(lines(found))  # type: ignore[attr-defined]


def test_numbers_are_compared_relatively() -> None:
    assert near(100.0, 101.0, 0.01).passed
    assert not near(100.0, 102.0, 0.01).passed
    assert not near(float("nan"), 1.0, 0.01).passed


def test_a_failure_says_mapping_found_and_expected() -> None:
    text = shown(outcome(*FOUND))
    assert "✗ EP2: step 0: found on rank 1: logits 0.3 apart; expected at most 1e-05" in text
    assert "1 of 3 checks failed on 2 ranks (CPU)" in text


def test_the_table_fits_80_columns() -> None:
    assert "…" not in shown(outcome(Finding("groups", "TP1 CP1 PP2 VPP2 · ETP1 EP1", True, "", "")))


def test_what_was_not_run_is_no_success() -> None:
    row = next(line for line in shown(outcome(*FOUND)).splitlines() if "│ EP2" in line)
    assert [row.count(mark) for mark in "✓✗·"] == [1, 1, 4]
    assert not outcome().passed


def test_json() -> None:
    values = json.loads(json.dumps(outcome(*FOUND).to_json()))
    assert values["passed"] is False
    assert values["findings"][1]["found"] == "on rank 1: logits 0.3 apart"
    assert values["bandwidths"][0]["planned"] == 425.7
    assert outcome(FOUND[0]).to_json()["passed"] is True

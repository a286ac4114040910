"""The report on trainings as a document: a table per study, and a verdict per claim."""

from collections.abc import Iterator, Sequence
from typing import Any

from nemo_upcycle.ablations.arms import Study
from nemo_upcycle.ablations.report import Report, Row
from nemo_upcycle.ablations.statistics import CONFIDENCE, Estimate

EXPERTS = {
    "loss": "loss",
    "confidence": "router_confidence",
    "entropy": "router_entropy",
    "load (CV)": "expert_load_cv",
    "dead experts": "dead_experts",
    "distance": "expert_distance",
}
"""Columns of the table of routers and experts, as in `Result.over_time`."""


def counted(count: int, word: str) -> str:
    """Return a count with a noun in singular or plural."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def markdown(report: Report, picture: str) -> str:
    """Return the report as a markdown document.

    Args:
        report: The report.
        picture: File name of the picture, in the document's directory.
    """
    return "\n".join([*_introduction(report, picture), *_summary(report), *_tables(report)])


def _introduction(report: Report, picture: str) -> Iterator[str]:
    claims = sum(len(one.findings) for one in report.studies)
    yield "# Ablations\n"
    model = report.base.upcycled.dense
    if report.dense_flops is not None:
        model = f"A dense Llama as the demo trains it ({report.dense_flops:.2g} FLOPs)"
    yield (
        f"{model}, upcycled and "
        f"trained on for {report.steps} steps of {report.tokens_per_step:,} tokens, "
        f"{counted(report.seeds, 'seed')} per arm. A seed decides the order of the data, the "
        "routers, the initializers and random weights; arms of one seed see the same sequences in "
        "the same order.\n"
    )
    yield (
        f"Losses are language-model losses in nats per token, on {report.held_out_tokens:,} tokens "
        "of held-out text, with the weights of the training's blend and no token dropped. Shown is "
        "mean ± standard error over seeds. Differences are to the first arm of a table, seed by "
        f"seed. A claim holds if Student's {CONFIDENCE:.0%} interval of the difference seed by "
        f"seed leaves out 0; of {counted(claims, 'claim')}, {claims * (1 - CONFIDENCE):.1f} would "
        "by chance if nothing made a difference. All trainings took "
        f"{report.seconds / 60:.0f} minutes of a core.\n"
    )
    if report.left_out:
        yield f"**Left out:** {'; '.join(report.left_out)}.\n"
    yield f"![Losses of all arms]({picture})\n"


def _summary(report: Report) -> Iterator[str]:
    yield "| study | claim | here |"
    yield "|:---|:---|:---|"
    for one in report.studies:
        for finding in one.findings:
            yield f"| {_title(one.study)} | {finding.claim.text} | {finding.verdict} |"
    yield ""


def _tables(report: Report) -> Iterator[str]:
    for one in report.studies:
        yield f"## {_title(one.study).capitalize()}\n\n{one.study.question}\n"
        columns = _columns(one.rows)
        yield "| arm | " + " | ".join(columns) + " |"
        yield "|:---|" + "---:|" * len(columns)
        for number, row in enumerate(one.rows):
            cells = [cell(row, number == 0) for cell in columns.values()]
            yield f"| {row.arm.label} | " + " | ".join(cells) + " |"
        yield ""
        if one.study.shows_experts:
            yield from _experts(one.rows)
        if one.study.note:
            yield f"{one.study.note}\n"
        for finding in one.findings:
            yield f"- {finding.claim.text} ({finding.claim.source}): **{finding}**."
        yield ""


def _columns(rows: Sequence[Row]) -> dict[str, Any]:
    """Return a table's columns by heading; columns on dropped tokens only if there are any."""
    columns: dict[str, Any] = {
        "loss at first": lambda row, first: str(row.start),
        "at the end": lambda row, first: str(row.end),
        "difference": lambda row, first: "" if first else row.difference.signed,
    }
    if any(row.dropped.mean for row in rows):
        columns |= {
            "with its capacity": lambda row, first: str(row.capped),
            "dropped": lambda row, first: f"{row.dropped.mean:.1%}",
        }
    if any(row.accuracy for row in rows):
        columns["next_line"] = lambda row, first: f"{row.accuracy}"
    return columns | {
        "tokens": lambda row, first: f"{row.tokens:,}",
        "FLOPs": lambda row, first: f"{row.flops:.2e}",
    }


def _experts(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table of routers and experts: at first, halfway and at the end."""
    yield (
        "On the held-out text, at first → halfway → at the end ± standard error, means over the "
        "layers:\n"
    )
    yield "| arm | " + " | ".join(EXPERTS) + " |"
    yield "|:---|" + "---:|" * len(EXPERTS)
    for row in rows:
        cells = [_course(row.over_time.get(name, ())) for name in EXPERTS.values()]
        yield f"| {row.arm.label} | " + " | ".join(cells) + " |"
    yield ""


def _course(values: Sequence[Estimate]) -> str:
    if not values:
        return ""
    *before, last = values
    error = "" if last.error is None else f" ± {last.error:.3f}"
    return " → ".join([*(f"{each.mean:.3f}" for each in before), f"{last.mean:.3f}{error}"])


def _title(study: Study) -> str:
    return study.name.replace("_", " ")

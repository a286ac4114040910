"""Show the planner's result: tables and sentences for people, JSON for programs."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nemo_upcycle.planner.efficiency import ACCURACY
from nemo_upcycle.planner.hardware import Hardware
from nemo_upcycle.planner.memory import Memory
from nemo_upcycle.planner.scaling import Point
from nemo_upcycle.planner.search import HEADROOM, Prediction
from nemo_upcycle.planner.tuning import COMPONENTS, Tuning, explain

GIB = 2**30

WHERE = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer, this rank's part",
    "activations": "activations in flight",
    "working": "working memory",
    "reserved": "CUDA, NCCL, allocator",
    "passing": "optimizer while loading, without activations",
}
"""Uses of memory, in words."""


def render(tuning: Tuning, title: str, top: int) -> RenderableType:
    """Show the fastest mappings, their use of time and memory, and the reasons.

    Args:
        tuning: The result of the search.
        title: Title of the report.
        top: Number of mappings to show.
    """
    shown = tuning.best[:top]
    hardware = shown[0].hardware
    head = Text.assemble(
        (title, "bold"),
        f"\n{tuning.fitting:,} of {tuning.tried:,} mappings fit into {HEADROOM:.0%} of "
        f"{hardware.memory_gib:g} GiB. The fastest, each with the best microbatch, virtual stages "
        "and recompute:",
    )
    named = {"1": shown[0], **tuning.compared}
    return Group(
        head,
        _mappings(shown, tuning.compared),
        _parts("seconds per step", {n: _seconds(one) for n, one in named.items()}),
        _parts("GiB per GPU", {n: _gib(one.memory) for n, one in named.items()}),
        Text("Why the first mapping", style="bold"),
        Text("\n".join(f"  {line}" for line in explain(tuning))),
        *([Text(f"\n{_origin(hardware)}", style="dim")] if hardware.measured else []),
        Text(f"\n{_caveat(hardware.name)}", style="dim"),
    )


def _origin(hardware: Hardware) -> str:
    """Say which figures were measured, and which are of a data sheet."""
    measured = {*hardware.measured.split()}
    values = {k: v for k, v in vars(hardware).items() if k not in ("name", "measured")}
    said = ", ".join(f"{k} {v:g}" for k, v in values.items() if k in measured)
    others = ", ".join(k for k in values if k not in measured)
    return (
        f"Measured by `nemo-upcycle check`, divided by the fractions that training reaches: {said} "
        f"GB/s. Of the data sheet of {hardware.name}: {others}."
    )


def _caveat(hardware: str) -> str:
    known = ACCURACY
    if hardware != "H100":
        known += f" Nothing was fitted to {hardware}."
    return f"{known} Differences below 5% are within this error: prefer the simpler mapping."


def _mappings(shown: Sequence[Prediction], compared: dict[str, Prediction]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for name in ("", "mapping", "mb", "recomp."):
        table.add_column(name, no_wrap=True)
    for name in ("GiB", "step", "even", "MFU%", "MFU*"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, one in enumerate(shown, 1):
        table.add_row(*_row(str(number), one))
    table.add_section()
    for name, one in compared.items():
        table.add_row(*_row(name, one), style="dim")
    counted = any(one.mapping.folding.accounted for one in (*shown, *compared.values()))
    table.caption = (
        ("+L, +EL: output layer, embedding count as layers; " if counted else "")
        + "mb: microbatch; step in s; even: with tokens spread evenly over the experts; "
        "MFU*: as arXiv 2412.09952 counts; !: does not fit"
    )
    table.caption_justify = "left"
    return table


def _row(name: str, one: Prediction) -> list[str]:
    mapping = one.mapping
    return [
        name,
        str(mapping.folding),
        str(mapping.micro_batch_size),
        mapping.recompute,
        f"{one.memory.total / GIB:.0f}" + ("" if one.fits else "!"),
        seconds(one.time.total),
        seconds(one.even_seconds),
        f"{100 * one.mfu:.1f}",
        f"{100 * one.mfu_full_attention:.1f}",
    ]


def seconds(value: float) -> str:
    """Return a step time as text."""
    return f"{value:.2g}" if value < 0.1 else f"{value:.{1 if value >= 10 else 2}f}"


def _seconds(one: Prediction) -> dict[str, float]:
    return {COMPONENTS[name]: value for name, value in one.time._asdict().items()}


def _gib(memory: Memory) -> dict[str, float]:
    return {WHERE[name]: value / GIB for name, value in vars(memory).items()}


def _parts(title: str, columns: dict[str, dict[str, float]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(title, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    rows = next(iter(columns.values()))
    for row in rows:
        values = [column[row] for column in columns.values()]
        if any(value >= 0.005 for value in values):
            table.add_row(row, *(f"{value:.2f}" for value in values))
    table.add_section()
    table.add_row("all", *(f"{sum(column.values()):.2f}" for column in columns.values()))
    return table


def scaling_table(points: Iterable[Point]) -> Table:
    """Return a table of how a job scales.

    Args:
        points: Jobs of several sizes.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("GPUs", justify="right")
    table.add_column("mapping", no_wrap=True)
    for name in ("recompute", "GiB", "step", "MFU", "load", "once"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in points:
        best = point.best
        if best is None or point.loading is None:
            table.add_row(str(point.gpus), _why_not(point), style="dim")
            continue
        table.add_row(
            str(point.gpus),
            str(best.mapping.folding),
            best.mapping.recompute,
            f"{best.memory.total / GIB:.1f}",
            seconds(best.time.total),
            f"{best.mfu:.1%}",
            f"{point.loading.seconds:.1f}",
            f"{point.loading.seconds_once:.1f}",
        )
    table.caption = "step and load in s; once: load with read_once"
    table.caption_justify = "left"
    return table


def _why_not(point: Point) -> str:
    if point.least is None:
        return "no mapping of the model and the batch"
    least = point.least.memory.total / GIB
    return f"does not fit: at least {least:.0f} GiB, optimizer included"


def to_json(tuning: Tuning, top: int) -> dict[str, Any]:
    """Return what was found as JSON objects.

    Args:
        tuning: The result of the search.
        top: Number of mappings.

    Returns:
        - `fitting` and `tried`: numbers of mappings.
        - `best` (a list) and `compared` (by name): predictions as of `prediction_json`.
        - `saving`: how memory was saved in the optimizer and what this costs: a sentence, or null.
        - `why`: sentences.
    """
    return {
        "fitting": tuning.fitting,
        "tried": tuning.tried,
        "best": [prediction_json(one) for one in tuning.best[:top]],
        "compared": {name: prediction_json(one) for name, one in tuning.compared.items()},
        "saving": tuning.saving,
        "why": explain(tuning),
    }


def prediction_json(one: Prediction) -> dict[str, Any]:
    """Return a prediction as a JSON object.

    Returns:
        `folding` (Megatron's fields), `world_size`, `micro_batch_size`, `recompute`,
        `optimizer` (the fields of `OptimizerStorage`), `fits`, `memory` and `total_memory`
        (bytes), `time`, `step_time` and `even_step_time` (seconds; even: tokens are spread evenly),
        `mfu`, `mfu_full_attention`,
        `tokens_per_second`.
    """
    return {
        **asdict(one.mapping),
        "optimizer": vars(one.workload.optimizer),
        "fits": one.fits,
        "memory": vars(one.memory),
        "total_memory": one.memory.total,
        "time": one.time._asdict(),
        "step_time": one.time.total,
        "even_step_time": one.even_seconds,
        "mfu": one.mfu,
        "mfu_full_attention": one.mfu_full_attention,
        "tokens_per_second": one.tokens_per_second,
    }


def point_json(point: Point) -> dict[str, Any]:
    """Return a job of one size as a JSON object: `gpus`, `best`, `least_memory`, `loading`."""
    return {
        "gpus": point.gpus,
        "best": point.best and prediction_json(point.best),
        "least_memory": point.least and point.least.memory.total,
        "loading": point.loading and asdict(point.loading),
    }

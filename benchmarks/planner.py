"""Fit the planner's efficiencies to published runs, and compare with runs that the fit never saw.

    python -m benchmarks.planner > benchmarks/results/DATE-planner.md

Each efficiency is held near the known value for the hardware, so that some twenty runs can
determine six numbers. If a source leaves a run's mapping open, the fastest allowed mapping is
compared.
"""

from collections.abc import Callable, Iterable, Sequence
from datetime import date
from functools import cache
from statistics import median

import numpy as np
from scipy.optimize import least_squares

from benchmarks.published import CALIBRATED as IN_FIT
from benchmarks.published import RUNS, Published
from nemo_upcycle.planner.efficiency import CALIBRATED, Efficiency
from nemo_upcycle.planner.hardware import hardware
from nemo_upcycle.planner.memory import of_stage
from nemo_upcycle.planner.search import search
from nemo_upcycle.planner.step_time import step_time
from nemo_upcycle.planner.workload import Mapping

PRIOR = {
    # Known value, and plausible factor of error.
    "gemm": (0.75, 1.1),  # cuBLAS on H100 reaches 650 to 800 TFLOP/s for large products
    "nvlink": (0.8, 1.1),  # NCCL's bus bandwidth: 350 to 400 GB/s of 450
    "network": (0.7, 1.15),
    "expert_load_cv": (0.1, 2.0),
    "host_layer": (5e-3, 2.0),
    "host_sync": (5e-3, 2.0),
}
BEFORE = Efficiency(**{name: middle for name, (middle, _) in PRIOR.items()})
MEASURED_WITHIN = 1.03
"""Assumed relative accuracy of published figures, as a factor."""

known = cache(hardware)

CANDIDATES = 2
"""Mappings per run that remain candidates while the efficiencies change."""

Row = tuple[Published, list[Mapping]]


def candidates(run: Published) -> list[Mapping]:
    """Return the mapping of a run, or the fastest that fit and that the source allows."""
    if isinstance(run.mapping, Mapping):
        return [run.mapping]
    found = search(run.workload, run.world_size, known(run.hardware), run.mapping, BEFORE)
    return [one.mapping for one in found[:CANDIDATES]]


def predicted(run: Published, mappings: list[Mapping], efficiency: Efficiency) -> float:
    """Return the seconds of a step on the fastest mapping."""
    routed = efficiency.even if run.even else efficiency
    on = known(run.hardware)
    return min(step_time(run.workload, mapping, on, routed).total for mapping in mappings)


def fit(rows: Sequence[Row]) -> Efficiency:
    """Fit the efficiencies to runs."""

    def of(deviations: np.ndarray) -> Efficiency:
        factors = [
            middle * factor**deviation
            for (middle, factor), deviation in zip(PRIOR.values(), deviations, strict=True)
        ]
        return Efficiency(**dict(zip(PRIOR, map(float, factors), strict=True)))

    def residuals(deviations: np.ndarray) -> np.ndarray:
        efficiency = of(deviations)
        errors = [predicted(run, found, efficiency) / run.seconds for run, found in rows]
        return np.concatenate([np.log(errors) / np.log(MEASURED_WITHIN), deviations])

    # The host's floor makes kinks, so that the fit starts at more than one place.
    starts = (np.full(len(PRIOR), start) for start in (-0.5, 0.0, 0.5))
    found = [least_squares(residuals, start, diff_step=1e-2, ftol=1e-5) for start in starts]
    return of(min(found, key=lambda one: one.cost).x)


def error(efficiency: Efficiency, row: Row) -> float:
    """Return the relative error of a prediction; positive is too slow."""
    run, mappings = row
    return predicted(run, mappings, efficiency) / run.seconds - 1


def without(rows: Sequence[Row], belongs: Callable[[Published], bool]) -> list[Row]:
    """Return the rows of other runs."""
    return [row for row in rows if not belongs(row[0])]


def model_of(run: Published) -> str:
    """Return the model, for leaving all of its runs out."""
    return next(name for name in MODELS if name in run.label)


MODELS = ("Llama 3 8B", "8x22B", "8x70B", "8x7B", "Qwen3", "8x22b", "8x7b")
KINDS = {
    "calibrated": "in the fit",
    "one": "each run left out of the fit in turn",
    "model": "each model left out of the fit in turn",
    "unseen": "in no fit",
}


def main() -> None:
    """Print the results as Markdown."""
    every = [(run, candidates(run)) for run in RUNS]
    measured = [row for row in every if row[0].seconds is not None]
    rows = [row for row in measured if row[0].role == IN_FIT]
    fitted = fit(rows)
    models = {model_of(run) for run, _ in rows}
    others = {
        model: fit(without(rows, lambda run, model=model: model_of(run) == model))
        for model in models
    }
    errors: dict[tuple[str, str], list[float]] = {}
    print(f"# Planner against published runs, {date.today()}\n")
    print("By `python -m benchmarks.planner`. Seconds per step; an error is positive where the")
    print("prediction is too slow. *One out*: predicted with efficiencies fitted to the other")
    print("runs; *model out*: to the runs of other models.\n")
    _print_efficiencies(fitted)
    print(
        "| run | experts | role | published | predicted | error | one out | model out | mapping |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in every:
        _print_row(row, fitted, rows, others, errors)
    _print_summary(errors)
    _print_memory(measured)
    print(f"\n{sentence(errors)}")


def _print_efficiencies(fitted: Efficiency) -> None:
    for called, efficiency in (("Fitted", fitted), ("Committed", CALIBRATED)):
        values = (f"{name} {getattr(efficiency, name):.3g}" for name in PRIOR)
        print(f"{called}: {', '.join(values)}.\n")


def _print_row(
    row: Row,
    fitted: Efficiency,
    rows: Sequence[Row],
    others: dict[str, Efficiency],
    errors: dict[tuple[str, str], list[float]],
) -> None:
    run, mappings = row
    start = f"| {run.label} | {run.experts} | {run.role} |"
    if run.seconds is None:
        print(f"{start} out of memory | {'fits' if mappings else 'does not fit'} |||||")
        return
    seconds = [predicted(run, [mapping], fitted) for mapping in mappings]
    best = mappings[int(np.argmin(seconds))]
    found = {"calibrated" if run.role == IN_FIT else "unseen": min(seconds) / run.seconds - 1}
    if run.role == IN_FIT:
        found["one"] = error(fit(without(rows, lambda other: other is run)), row)
        found["model"] = error(others[model_of(run)], row)
    for kind, value in found.items():
        errors.setdefault((run.experts, kind), []).append(abs(value))
    first, *left_out = (f"{value:+.1%}" for value in found.values())
    columns = " | ".join([first, *(left_out or ["", ""])])
    print(f"{start} {run.seconds:.2f} | {min(seconds):.2f} | {columns} | {best} |")


def _print_summary(errors: dict[tuple[str, str], list[float]]) -> None:
    print("\n| experts | runs | | median error | largest |\n|---|---|---|---|---|")
    for (experts, kind), values in sorted(errors.items()):
        shown = f"{median(values):.1%} | {max(values):.1%}"
        print(f"| {experts} | {len(values)} | {KINDS[kind]} | {shown} |")


def _print_memory(rows: Iterable[Row]) -> None:
    print("\nPeak of PyTorch's allocated memory on the last pipeline stage, GiB; in no fit.\n")
    print("| run | published | predicted | error |\n|---|---|---|---|")
    for run, (mapping, *_) in rows:
        if run.peak_gib is None:
            continue
        stage = mapping.folding.pipeline_model_parallel_size - 1
        used = of_stage(run.workload, mapping, stage)
        gib = (used.total - used.reserved) / 2**30
        print(f"| {run.label} | {run.peak_gib} | {gib:.1f} | {gib / run.peak_gib - 1:+.1%} |")


def sentence(errors: dict[tuple[str, str], list[float]]) -> str:
    """Return what README says of the planner's accuracy."""
    coarse, narrow, unseen = (
        errors["coarse", "model"],
        errors["narrow", "model"],
        errors["coarse", "unseen"] + errors["narrow", "unseen"],
    )
    return (
        f"Predicted without the runs of the same model, {len(coarse)} published runs with coarse "
        f"experts have a median error of {median(coarse):.0%} and a largest error of "
        f"{max(coarse):.0%}; {len(narrow)} runs with narrow experts have {median(narrow):.0%} and "
        f"{max(narrow):.0%}. {len(unseen)} runs that no fit saw have {median(unseen):.0%} and "
        f"{max(unseen):.0%}."
    )


if __name__ == "__main__":
    main()

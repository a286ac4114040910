"""Fit the planner's efficiencies to published runs, and cross-validate by leaving runs out.

    python -m benchmarks.planner > benchmarks/results/DATE-planner.md

Each efficiency is held near the known value for the hardware, so that twelve runs can determine
five numbers. If a paper leaves a run's mapping open, the fastest allowed mapping is compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date

import numpy as np
from scipy.optimize import least_squares

from benchmarks.published import RUNS, Published
from nemo_upcycle.planner.efficiency import CALIBRATED, Efficiency
from nemo_upcycle.planner.hardware import hardware
from nemo_upcycle.planner.search import Prediction, search
from nemo_upcycle.planner.step_time import step_time

H100 = hardware("h100")

PRIOR = {
    # Known value, and plausible factor of error.
    "gemm": (0.75, 1.1),  # cuBLAS on H100 reaches 650 to 800 TFLOP/s for large products
    "nvlink": (0.8, 1.2),  # NCCL's bus bandwidth: 350 to 400 GB/s of 450
    "network": (0.7, 1.15),
    "expert_load_cv": (0.15, 1.5),
    "fsdp_bandwidth": (0.9, 1.3),
}
BEFORE = Efficiency(**{name: middle for name, (middle, _) in PRIOR.items()})
MEASURED_WITHIN = 1.03
"""Assumed relative accuracy of published figures, as a factor."""

CANDIDATES = 12
"""Mappings per run that remain candidates while the efficiencies change."""

Row = tuple[Published, list[Prediction]]


def candidates(run: Published) -> list[Prediction]:
    """Return the fastest mappings that fit into memory and that the paper allows for the run."""
    fsdp = "FSDP" in run.label
    return search(run.workload, run.world_size, H100, run.allowed, BEFORE, fsdp)[:CANDIDATES]


def predicted_mfu(found: list[Prediction], efficiency: Efficiency) -> float:
    """Return the fastest mapping's MFU, with attention counted over the full square."""
    times = [step_time(one.workload, one.mapping, H100, efficiency) for one in found]
    time = min(times, key=lambda one: one.total)
    return replace(found[times.index(time)], time=time).mfu_full_attention


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
        errors = [predicted_mfu(found, efficiency) / run.mfu for run, found in rows]
        return np.concatenate([np.log(errors) / np.log(MEASURED_WITHIN), deviations])

    return of(least_squares(residuals, np.zeros(len(PRIOR)), diff_step=1e-3).x)


GROUPS = {
    "arXiv 2412.09952": lambda run: run.source == "2412.09952",
    "Mixtral 8x22B": lambda run: "8x22B" in run.label,
    "Llama3-8x70B": lambda run: "8x70B" in run.label,
    "FSDP": lambda run: "FSDP" in run.label,
}


def main() -> None:
    """Print the results as Markdown."""
    every = [(run, candidates(run)) for run in RUNS]
    rows = [(run, found) for run, found in every if run.mfu is not None]
    fitted = fit(rows)
    print(f"# Planner against published runs, {date.today()}\n")
    print("By `python -m benchmarks.planner`; MFU of H100, attention over the whole square. *Left")
    print("out*: predicted with efficiencies fitted to the other runs alone; *group left out*: to")
    print("the runs of the other models.\n")
    print("Efficiencies: " + ", ".join(f"{n} {getattr(fitted, n):.3f}" for n in PRIOR), end="; ")
    print("committed: " + ", ".join(f"{getattr(CALIBRATED, n):.3f}" for n in PRIOR) + ".\n")
    print("| run | published | fitted | error | left out | error | mapping |")
    print("|---|---|---|---|---|---|---|")
    for run, found in every:
        _print_row(run, found, fitted, rows)
    print("\n| group left out | run | published | predicted | error |\n|---|---|---|---|---|")
    for name, belongs in GROUPS.items():
        _print_group(name, belongs, rows)


def _print_row(
    run: Published, found: list[Prediction], fitted: Efficiency, rows: Sequence[Row]
) -> None:
    if run.mfu is None:
        print(f"| {run.label} | out of memory | {'fits' if found else 'does not fit'} |||||")
        return
    others = fit([row for row in rows if row[0] is not run])
    seconds = [step_time(one.workload, one.mapping, H100, fitted).total for one in found]
    best = found[int(np.argmin(seconds))].mapping
    values = [predicted_mfu(found, efficiency) for efficiency in (fitted, others)]
    columns = " | ".join(f"{value:.1%} | {value / run.mfu - 1:+.1%}" for value in values)
    print(f"| {run.label} | {run.mfu:.1%} | {columns} | {best} |")


def _print_group(name: str, belongs: Callable[[Published], bool], rows: Sequence[Row]) -> None:
    others = fit([row for row in rows if not belongs(row[0])])
    for run, found in rows:
        if belongs(run):
            value = predicted_mfu(found, others)
            error = f"{value / run.mfu - 1:+.1%}"
            print(f"| {name} | {run.label} | {run.mfu:.1%} | {value:.1%} | {error} |")


if __name__ == "__main__":
    main()

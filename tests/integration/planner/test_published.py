"""The planner against what was published."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import planner as benchmark
from benchmarks.published import CALIBRATED as IN_FIT
from benchmarks.published import LLAMA3_8B, MEGATRON_TESTS, MIXTRAL, PAPER, RUNS, Published
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.planner.efficiency import ACCURACY, CALIBRATED
from nemo_upcycle.planner.hardware import hardware
from nemo_upcycle.planner.memory import of_stage
from nemo_upcycle.planner.search import predict, search
from nemo_upcycle.planner.step_time import step_time
from nemo_upcycle.planner.workload import Mapping, Workload

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "benchmarks/results/2026-11-28-planner.md").read_text()
H200 = (ROOT / "benchmarks/results/2026-11-26-h200.md").read_text()
MEASURED = [run for run in RUNS if run.seconds is not None]
CALIBRATION = [run for run in MEASURED if run.role == IN_FIT]

Found = dict[Published, list[Mapping]]


@pytest.fixture(scope="module")
def found() -> Found:
    """Return the candidates of every published run, which are searched for once."""
    return {run: benchmark.candidates(run) for run in RUNS}


@pytest.mark.parametrize("run", MEASURED, ids=lambda run: run.label)
def test_published_speeds(run: Published, found: Found) -> None:
    """Runs in the fit are close; of the others, real routing of narrow experts is the farthest."""
    error = benchmark.error(CALIBRATED, (run, found[run]))
    assert abs(error) < (0.08 if run.role == IN_FIT else 0.17)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.label)
def test_what_did_not_fit_does_not_and_what_ran_does(run: Published, found: Found) -> None:
    if isinstance(run.mapping, Mapping):
        assert predict(run.workload, run.mapping, hardware(run.hardware)).fits
    else:
        assert bool(found[run]) == (run.seconds is not None)


def test_committed_efficiencies_are_the_fitted(found: Found) -> None:
    fitted = benchmark.fit([(run, found[run]) for run in CALIBRATION])
    for name in benchmark.PRIOR:
        assert getattr(fitted, name) == pytest.approx(getattr(CALIBRATED, name), rel=1e-2), name


@pytest.mark.parametrize("model", sorted({benchmark.model_of(run) for run in CALIBRATION}))
def test_runs_of_a_model_are_predicted_from_others(model: str, found: Found) -> None:
    rows = [(run, found[run]) for run in CALIBRATION]
    others = benchmark.fit([row for row in rows if benchmark.model_of(row[0]) != model])
    for row in rows:
        if benchmark.model_of(row[0]) == model:
            assert abs(benchmark.error(others, row)) < 0.13, row[0].label


@pytest.mark.parametrize("run", MEGATRON_TESTS, ids=lambda run: f"{run.label} {run.hardware}")
def test_peaks_of_memory_that_megatron_measured(run: Published) -> None:
    """Megatron's tests read the peak on the last rank, which is in the last pipeline stage."""
    stage = run.mapping.folding.pipeline_model_parallel_size - 1
    used = of_stage(run.workload, run.mapping, stage)
    assert (used.total - used.reserved) / 2**30 == pytest.approx(run.peak_gib, rel=0.05)


@pytest.mark.parametrize("model", ["Mixtral 8x22B", "Llama3-8x70B"])
def test_order_of_the_methods(model: str, found: Found) -> None:
    """Folding above Megatron-Core without, above no pipeline."""
    names = ("folding", "Megatron-Core", "TP + EP + DP")
    runs = {run.label: run for run in MEASURED if run.source == "2504.14960"}
    seconds = [
        benchmark.predicted(run, found[run], CALIBRATED)
        for name in names
        if (run := runs.get(f"{model}, {name}"))
    ]
    assert len(seconds) > 1
    assert seconds == sorted(seconds)


def test_the_papers_capacity_factors_keep_their_order(found: Found) -> None:
    """CF 1 on TP1 is a fifth faster than the others, which are alike."""
    first, *others = [benchmark.predicted(run, found[run], CALIBRATED) for run in PAPER]
    assert 1.15 < min(others) / first < 1.3
    assert max(others) / min(others) < 1.02


def test_the_best_mapping_is_not_slower_than_nvidias() -> None:
    """Mixtral 8x7B on 64 H100, which NVIDIA measured at 468 TFLOP/s."""
    run = MIXTRAL[0]
    best, *_ = search(run.workload, run.world_size, hardware(run.hardware))
    theirs = predict(run.workload, run.mapping, hardware(run.hardware))
    assert best.time.total <= theirs.time.total


def test_the_page_of_results_is_of_this_planner(found: Found) -> None:
    """Every published run is in the page, with the seconds that are predicted now."""
    rows = {
        (cells[1].strip(), cells[4].strip()): cells
        for cells in (line.split("|") for line in PAGE.splitlines())
        if len(cells) == 11
    }
    for run in RUNS:
        published = "out of memory" if run.seconds is None else f"{run.seconds:.2f}"
        cells = rows[run.label, published]
        assert cells[3].strip() == run.role
        if run.seconds is not None:
            seconds = benchmark.predicted(run, found[run], CALIBRATED)
            assert float(cells[5]) == pytest.approx(seconds, rel=1e-2, abs=6e-3), run.label


def test_what_is_said_of_the_accuracy_is_the_pages() -> None:
    """README and the command say what the benchmark found."""
    assert PAGE.rstrip().endswith(ACCURACY)
    for document in ("README.md", "docs/planner.md"):
        text = re.sub(r"\s+", " ", (ROOT / document).read_text())
        assert ACCURACY in text, document


def test_layers_on_one_h200_take_what_is_predicted() -> None:
    """No fit saw these steps of one, two and four layers, with fused weight gradients."""
    chip, mapping = hardware("h200"), Mapping(ParallelFolding(), 1)
    measured = [row for row in _rows(H200) if row["gradients"] == "fused"]
    assert len(measured) == 13
    for row in measured:
        sizes = {"num_layers": int(row["layers"]), "vocab_size": int(row["vocab"])}
        capacity = None if row["CF"] == "dropless" else float(row["CF"])
        work = Workload(
            replace(LLAMA3_8B, **sizes),
            UpcyclingConfig(moe_expert_capacity_factor=capacity),
            seq_length=8192,
            global_batch_size=1,
        )
        planned = step_time(work, replace(mapping, recompute=row["recompute"]), chip).total
        assert planned * 1e3 == pytest.approx(float(row["ms"].split()[0]), rel=0.06), row


def _rows(page: str) -> list[dict[str, str]]:
    """Return the rows of the table of layers."""
    lines = page[page.index("| layers | vocab") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]

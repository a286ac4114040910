"""Loss curves: read from real event files, merged, compared, drawn."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import rich.console

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.evaluation.curves import Curve, compare_runs, plot, read_curve, render, smooth
from tests.events import write_events

LOSS, VAL = "reduced_train_loss", "val_loss"


def falling(first: float, steps: int, slope: float) -> dict[int, float]:
    return {step: first - slope * step for step in range(steps)}


def test_reads_training_and_validation_loss(tmp_path: Path) -> None:
    write_events(
        tmp_path / "run" / "tb_logs" / "version_0",
        {LOSS: {0: 4.0, 1: 3.5, 2: 3.25}, VAL: {1: 3.75}, "lr": {0: 1.0}},
    )
    assert read_curve(tmp_path / "run") == Curve("run", (0, 1, 2), (4.0, 3.5, 3.25), (1,), (3.75,))
    assert read_curve(tmp_path / "run", "lr", name="rate").loss == (1.0,)


@pytest.mark.parametrize("folders", [("a", "a"), ("a", "b"), ("b", "a")])
def test_resumed_run_is_merged_and_the_later_value_counts(
    tmp_path: Path, folders: tuple[str, str]
) -> None:
    # The run broke off after step 3 and was resumed from the checkpoint of step 1.
    write_events(tmp_path / folders[0], {LOSS: {0: 4.0, 1: 3.0, 2: 9.0, 3: 9.5}}, start=100.0)
    write_events(tmp_path / folders[1], {LOSS: {2: 2.5, 3: 2.0, 4: 1.5}, VAL: {4: 2.0}}, start=200)
    curve = read_curve(tmp_path)
    assert curve.steps == (0, 1, 2, 3, 4)
    assert curve.loss == (4.0, 3.0, 2.5, 2.0, 1.5)
    assert (curve.val_steps, curve.val_loss) == ((4,), (2.0,))


def test_no_step_of_a_long_run_is_dropped(tmp_path: Path) -> None:
    steps = 10_500  # TensorBoard keeps 10,000 of them unless told otherwise
    write_events(tmp_path, {LOSS: falling(4.0, steps, 1e-4)})
    assert read_curve(tmp_path).steps == tuple(range(steps))


def test_broken_off_file_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    file = write_events(tmp_path, {LOSS: {0: 4.0, 1: 3.5, 2: 3.25}})
    file.write_bytes(file.read_bytes()[:-5])
    assert read_curve(tmp_path).loss == (4.0, 3.5)


def test_missing_files_and_metrics_are_named(tmp_path: Path) -> None:
    with pytest.raises(UpcyclingError, match=r"no TensorBoard event files.*absent"):
        read_curve(tmp_path / "absent")
    write_events(tmp_path / "run", {"lr": {0: 1.0}})
    with pytest.raises(UpcyclingError, match=r"no reduced_train_loss .*run; they have: lr"):
        read_curve(tmp_path / "run")


def test_final_loss_is_the_mean_of_the_last_tenth() -> None:
    assert Curve("c", tuple(range(20)), tuple(float(i) for i in range(20))).final_loss == 18.5
    assert Curve("c", (0,), (3.0,)).final_loss == 3.0


def test_smooth_keeps_the_first_value_and_a_straight_start() -> None:
    line = [float(i) for i in range(50)]
    assert smooth(line, 9)[:46] == line[:46]
    noisy = [1.0] * 20 + [5.0]
    assert smooth(noisy, 9)[0] == 1.0
    assert smooth(noisy, 9)[-1] == pytest.approx(9 / 5)
    assert smooth(noisy, 1) == noisy


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    dense, moe = tmp_path / "dense", tmp_path / "moe"
    write_events(dense, {LOSS: falling(4.0, 40, 0.01), VAL: {19: 3.9, 39: 3.75}})
    write_events(moe, {LOSS: {**falling(4.0, 40, 0.02), 0: 4.0 + 2**-20}, VAL: {39: 3.5}})
    return dense, moe


def test_comparison_in_numbers(runs: tuple[Path, Path], tmp_path: Path) -> None:
    comparison = compare_runs(*runs, tmp_path / "out", tokens_per_step=8 * 512)
    assert comparison.first_step_difference == 2**-20
    table = {
        cells[0]: cells[1:]
        for line in comparison.markdown.read_text(encoding="utf-8").splitlines()
        if line.startswith("|") and len(cells := line.strip("| ").split(" | ")) == 4
    }
    assert table["first training loss (step 0)"] == ["4.000000", "4.000001", "9.5e-07 (absolute)"]
    # The last four steps of 40 are 36 to 39.
    assert table["final training loss (mean of last 10%)"] == ["3.6250", "3.2500", "-0.3750"]
    assert table["final validation loss"] == ["3.7500", "3.5000", "-0.2500"]
    assert table["training tokens"] == ["163,840", "163,840", "+0"]


def test_table_and_markdown_say_the_same(runs: tuple[Path, Path], tmp_path: Path) -> None:
    comparison = compare_runs(*runs, tmp_path / "out", tokens_per_step=1, names=("before", "after"))
    console = rich.console.Console(width=200, record=True, file=io.StringIO())
    console.print(render(comparison, "A title"))
    shown = console.export_text()
    for word in ("A title", "before", "after", "4.000001", "9.5e-07", "-0.3750", "-0.2500", "40"):
        assert word in shown
        assert word == "A title" or word in comparison.markdown.read_text(encoding="utf-8")


def test_runs_without_validation_and_of_different_length(tmp_path: Path) -> None:
    write_events(tmp_path / "d", {LOSS: falling(4.0, 40, 0.01)})
    write_events(tmp_path / "m", {LOSS: falling(4.0, 20, 0.01)})
    comparison = compare_runs(tmp_path / "d", tmp_path / "m", tmp_path / "out", tokens_per_step=10)
    text = comparison.markdown.read_text(encoding="utf-8")
    assert "| 400 | 200 | -200 |" in text
    assert "4.000000 | 4.000000 | 0 (absolute)" in text
    assert "validation" not in text


def test_picture_shows_both_runs_over_tokens(runs: tuple[Path, Path], tmp_path: Path) -> None:
    from matplotlib.image import imread

    comparison = compare_runs(*runs, tmp_path / "out", tokens_per_step=4096)
    assert imread(comparison.picture).std() > 0.05, "not an empty page"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "comparison.md",
        "comparison.png",
    ]
    axes = plot(comparison, "Title").axes[0]
    raw = axes.lines[0].get_xydata()
    assert raw[0].tolist() == [4096, 4.0]
    assert raw[-1].tolist() == [40 * 4096, pytest.approx(3.61)]
    assert "tokens" in axes.get_xlabel()
    assert "nats" in axes.get_ylabel()
    assert len(axes.get_legend().get_texts()) == 4
    note = axes.texts[0]
    assert note.xy == (4096, 4.0 + 2**-20)
    for part in ("dense 4.000000", "MoE 4.000001", "9.5e-07"):
        assert part in note.get_text()


def test_runs_that_cannot_be_compared(runs: tuple[Path, Path], tmp_path: Path) -> None:
    write_events(tmp_path / "late", {LOSS: {9: 3.0}})
    with pytest.raises(UpcyclingError, match=r"step 0.*step 9.*log_every_n_steps=1"):
        compare_runs(runs[0], tmp_path / "late", tmp_path / "out", tokens_per_step=1)
    with pytest.raises(UpcyclingError, match="tokens_per_step is 0"):
        compare_runs(*runs, tmp_path / "out", tokens_per_step=0)
    assert not (tmp_path / "out").exists()


def test_missing_matplotlib_is_one_clear_error(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pathlib import Path\n"
        "from nemo_upcycle.evaluation.curves import compare_runs\n"
        "compare_runs(Path('d'), Path('m'), Path('out'), tokens_per_step=1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert "UpcyclingError" in done.stderr
    assert "pip install 'nemo-upcycle[demo]'" in done.stderr


@pytest.mark.parametrize("module", ["data.sample", "data.tokenizer", "data.preparation"])
def test_importing_costs_nothing(module: str) -> None:
    heavy = ["torch", "megatron", "transformers", "tokenizers", "matplotlib", "tensorboard", "rich"]
    script = (
        f"import sys, nemo_upcycle.{module}, nemo_upcycle.evaluation.curves\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == "[]\n", done.stderr

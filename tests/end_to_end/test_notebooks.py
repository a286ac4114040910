"""The notebooks run from top to bottom, and what they store is what they show."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_output

from tests.end_to_end import notebooks

BY_NUMBER = {path.name[:2]: path for path in notebooks.NOTEBOOKS}


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_three() -> None:
    assert sorted(BY_NUMBER) == ["01", "02", "03"]


@pytest.mark.parametrize("number", BY_NUMBER)
def test_stored_as_executed_and_clean(number: str) -> None:
    path = BY_NUMBER[number]
    notebook = notebooks.read(path)
    assert notebooks.faults(notebook) == []
    assert path.read_text() == notebooks.text(notebooks.stored(notebook))
    assert path.stat().st_size < 600_000
    pictures = sum("image/png" in out.get("data", {}) for c in code(notebook) for out in c.outputs)
    assert pictures >= 2


@pytest.mark.parametrize("number", BY_NUMBER)
def test_links_lead_somewhere(number: str) -> None:
    notebook = notebooks.read(BY_NUMBER[number])
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", prose) if "://" not in target]
    assert targets
    for target in targets:
        assert (notebooks.EXAMPLES / target.partition("#")[0]).exists(), target


def _drop_outputs(notebook: NotebookNode) -> None:
    next(cell for cell in code(notebook) if "print(" in cell.source)["outputs"] = []


def _swap_counts(notebook: NotebookNode) -> None:
    code(notebook)[0]["execution_count"] = 2


def _say_a_path(notebook: NotebookNode) -> None:
    code(notebook)[-1]["outputs"] = [new_output("stream", text="/home/me/demo: written\n")]


def _fail(notebook: NotebookNode) -> None:
    code(notebook)[1]["outputs"] = [new_output("error", ename="KeyError", evalue="'x'")]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_drop_outputs, "shows nothing"),
        (_swap_counts, "execution counts"),
        (_say_a_path, "/home/me"),
        (_fail, "KeyError"),
    ],
)
def test_faults_are_seen(damage: Callable[[NotebookNode], None], said: str) -> None:
    notebook = copy.deepcopy(notebooks.read(BY_NUMBER["01"]))
    damage(notebook)
    assert any(said in fault for fault in notebooks.faults(notebook))


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Execute a notebook in an empty directory; return all that it shows."""

    def run(number: str) -> str:
        stored = notebooks.read(BY_NUMBER[number])
        directory = tmp_path_factory.mktemp(f"notebook_{number}") / "examples"
        done = notebooks.execute(stored, directory)
        assert notebooks.faults(done) == []
        assert _kinds(done) == _kinds(stored)
        return "\n".join(notebooks.shown(cell) for cell in code(done))

    return run


def _kinds(notebook: NotebookNode) -> list[tuple[str, ...]]:
    """Return what kinds of output each cell has."""
    return [
        tuple(out.get("name") or "+".join(sorted(out.get("data", {}))) for out in cell.outputs)
        for cell in code(notebook)
    ]


def found(pattern: str, text: str) -> tuple[float, ...]:
    match = re.search(pattern, text)
    assert match, pattern
    return tuple(map(float, match.groups()))


@pytest.mark.slow
def test_01_upcycles_exactly_and_learns(executed: Callable[[str], str]) -> None:
    said = executed("01")
    assert re.findall(r"exact but for rounding +(\w+)", said) == ["True", "False"]
    assert "step 0            exact" in said
    first, last = found(r"MoE: ([\d.]+) at its first step, ([\d.]+) at the end", said)
    assert last < first - 0.1
    begun, middle = found(r"step   0: ([\d.]+) nats[^\n]*\nstep  60: ([\d.]+)", said)
    assert first < middle < begun
    assert "copies, step 0   to the dense layer 0.00, between experts 0.00" in said
    moved = found(r"copies, step 60  to the dense layer ([\d.]+), between experts ([\d.]+)", said)
    assert 0 < moved[0] < moved[1]


@pytest.mark.slow
def test_02_plans_and_writes_the_job(executed: Callable[[str], str]) -> None:
    said = executed("02")
    for line in (
        "llama3_8b_e8t2 on 128 H100",
        "job reads   1.59 TiB",
        "6 experts do not divide",
        "Dry run for pretrain",
        "#SBATCH --nodes=16",
        "#SBATCH --signal=TERM@300",
        "scontrol requeue",
        "--container-image /images/nemo-upcycle.sqsh",
    ):
        assert line in said
    (kept,) = found(r"demo/blend/documentation: (\d+) documents", said)
    assert 400 < kept < 535


@pytest.mark.slow
def test_03_exports_scores_and_compares_from_nothing(executed: Callable[[str], str]) -> None:
    said = executed("03")
    assert "exact: True" in said
    same, all_tensors = found(r"the same bits:  (\d+) of (\d+) tensors", said)
    assert same == all_tensors > 50
    rows = re.findall(r"\| next_line \| 0 \| (\w+) \| ([\d.]+) ± [\d.]+ \| ([\d.]+)", said)
    assert [row[0] for row in rows] == ["acc", "acc_norm"]
    assert all(0 < float(score) < 1 for row in rows for score in row[1:])
    assert re.search(r"average +62\.7 +63\.9 +\+1\.2", said)


def test_execution_happens_in_the_directory(tmp_path: Path) -> None:
    source = "import os\nopen('made', 'w').close()\nprint(os.environ['NEMORUN_HOME'])"
    one = notebooks.new(source)
    done = notebooks.execute(one, tmp_path / "here")
    assert (tmp_path / "here" / "made").exists()
    assert notebooks.shown(done.cells[0]).strip() == str(tmp_path / "nemorun_home")

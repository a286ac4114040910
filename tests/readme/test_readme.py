"""The README is true: its commands are the demo's, and they run."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from nemo_upcycle.cli import app
from tests.end_to_end import cli

ROOT = Path(__file__).parents[2]


def blocks(heading: str) -> list[str]:
    """Return the shell commands under a heading of the README, one a line."""
    section = (ROOT / "README.md").read_text().split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    code = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)
    lines = "\n".join(code).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


STEPS = [line for line in blocks("Step by step") if not line.startswith("CPU2=")]
LIGHT = [line for line in STEPS if line.startswith("nemo-upcycle data")]
AFTERWARDS = blocks("Out of NeMo, and measured")
DATA = blocks("Your data")
TRAININGS = [line for line in STEPS if line.startswith("nemo llm pretrain")]


def words(line: str) -> list[str]:
    return shlex.split(line.replace("$CPU2", "run.executor=cpu run.executor.ntasks_per_node=2"))


def test_steps_are_those_of_the_demo() -> None:
    demo = (ROOT / "examples" / "demo.sh").read_text().replace("\\\n", " ")
    commands = re.findall(r'^step "[^"]*" "[^"]*" +(.*)$', demo, flags=re.MULTILINE)
    assert [words(line) for line in commands] == [words(line) for line in STEPS]
    assert len(STEPS) == 12


def test_tree_names_files_that_exist() -> None:
    tree = (ROOT / "README.md").read_text().split("## What is where\n", 1)[1]
    tree = re.findall(r"```\n(.*?)```", tree, flags=re.DOTALL)[0]
    folder = Path()
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = Path(name) if name.endswith("/") else Path()
            path = ROOT / name
        else:
            path = ROOT / folder / name
        assert path.exists(), path


def test_data_steps_run_as_written(tmp_path: Path) -> None:
    for line in LIGHT:
        cli.run(tmp_path, *words(line))
    for file in ("documentation.idx", "documentation.bin", "sources.idx", "sources.bin"):
        assert (tmp_path / "demo" / "data" / file).stat().st_size > 0
    assert (tmp_path / "demo" / "tokenizer" / "tokenizer.json").exists()
    assert (tmp_path / "demo" / "task" / "next_line.yaml").exists()


@pytest.mark.parametrize("line", [x for x in (*STEPS, *DATA, *AFTERWARDS) if "nemo-upcycle" in x])
def test_options_exist(line: str) -> None:
    _, *arguments = words(line)
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[arguments.pop(0)]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in arguments if word.startswith("-")} <= known


@pytest.mark.parametrize("line", TRAININGS)
def test_trainings_are_configured_as_written(tmp_path: Path, line: str) -> None:
    arguments = [word for word in words(line) if word != "--yes"]
    output = cli.run(tmp_path, *arguments, "--dryrun")
    assert "Dry run for pretrain" in output


CONFIGURED = [*blocks("The real run"), *blocks("Ways of upcycling")]


@pytest.mark.parametrize("line", [x for x in CONFIGURED if x.startswith("nemo llm pretrain")])
def test_runs_are_configured_as_written(tmp_path: Path, line: str) -> None:
    assert "--dryrun" in words(line)
    output = cli.run(tmp_path, *words(line))
    assert "Dry run for pretrain" in output
    assert "max_steps=100," in output if "llama_tiny" in line else "max_steps=23842" in output
    assert "UpcyclingCallback" in output


@pytest.mark.parametrize("line", [x for x in CONFIGURED if x.startswith("nemo-upcycle plan")])
def test_plans_are_printed_as_written(tmp_path: Path, line: str) -> None:
    output = cli.run(tmp_path, *words(line))
    assert "job reads" in output
    assert "step 0" in output


def test_the_plan_is_the_one_shown(tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().split("## The real run\n", 1)[1]
    code = re.findall(r"```\w*\n(.*?)```", section, flags=re.DOTALL)
    (shown,) = (block for block in code if block.startswith(" stage"))
    output = cli.run(tmp_path, "nemo-upcycle", "plan")
    printed = [" ".join(line.split()) for line in output.splitlines()]
    for line in shown.splitlines():
        if line.strip(" ─"):
            assert " ".join(line.split()) in printed, line


def test_the_initializer_shown_works(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_upcycle.initializers import make_initializer, registry

    monkeypatch.setattr(registry, "_makers", dict(registry._makers))
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (shown,) = (block for block in code if "@register" in block)
    exec(shown, {})
    make_initializer("flip(fraction=0.1)")


def _in_shell(directory: Path, line: str) -> str:
    script = directory / "line.sh"
    script.write_text(f"#!/usr/bin/env bash\nset -e\n{line}\n")
    script.chmod(0o755)
    return cli.run_script(directory, str(script), timeout=300)


@pytest.mark.slow
def test_demo_runs_and_a_second_run_reuses_it(tmp_path: Path) -> None:
    demo = str(ROOT / "examples" / "demo.sh")
    output = cli.run_script(tmp_path, demo, timeout=1800)
    table = (tmp_path / "demo" / "comparison.md").read_text()
    assert (tmp_path / "demo" / "comparison.png").stat().st_size > 10_000
    assert "failed" not in output
    (first,) = (line for line in table.splitlines() if "step 0" in line)
    dense, moe = (float(cell) for cell in first.split("|")[2:4])
    assert abs(dense - moe) < 1e-5
    assert len((tmp_path / "demo" / "sample.txt").read_text()) > 40
    scores = (tmp_path / "demo" / "evaluation" / "scores.md").read_text()
    rows = [line.split("|") for line in scores.splitlines() if "next_line" in line]
    assert [row[3].strip() for row in rows] == ["acc", "acc_norm"]
    assert all(0 < float(cell.split("±")[0]) < 1 for row in rows for cell in row[4:6])
    said = [_in_shell(tmp_path, line) for line in AFTERWARDS]
    assert "MixtralForCausalLM" in said[0]
    assert "not exact: attention, norms" in said[3]
    assert said[4].count("acc") > 1
    again = cli.run_script(tmp_path, demo)
    assert again.count("done before, reused") == 12

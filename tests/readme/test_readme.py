"""README.md and docs/ are true: their commands are the demo's, and they run."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from nemo_upcycle.checkpoint.tokenizer_files import copy_tokenizer
from nemo_upcycle.cli import app
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from tests.corpora import many, write
from tests.distributed import scenarios
from tests.distributed.pool import RankPool
from tests.end_to_end import cli
from tests.readme.documents import PAGES, ROOT, Command, code, commands, text
from tests.tiny import LLAMA_400M, tokens, write_llama
from tests.workspace import make_workspace

ALL = [command for page in PAGES for command in commands(page)]
STEPS = commands("docs/demo.md")
AFTERWARDS = commands("docs/export-and-evaluate.md")
"""Run by the slow test, after the demo."""

GROWN = [c for c in commands("docs/upcycle.md") if c.words[0] == "nemo"]
"""Run by a slow test of its own."""

OURS = [command for command in ALL if "nemo-upcycle" in command.words[:1]]
SHOWS = {
    "plan": "step 0",
    "groups": "expert",
    "tune": "nemo llm pretrain --factory",
    "worth": "Sunk and not counted",
}
"""What commands that predict print."""

PREDICTED = [command for command in OURS if command.words[1] in SHOWS]
TRAININGS = [command for command in ALL if command.line.startswith("nemo llm pretrain")]
EXPERIMENTS = [command for command in ALL if "examples/experiment.py" in command.line]

NOT_RUN = {
    "curl": "downloads 100 files of RedPajama-V2",
    "pip": "what the extras are is checked",
    "make": "what the targets are is checked",
}


def test_every_command_has_a_test() -> None:
    tested = {*STEPS, *AFTERWARDS, *GROWN, *OURS, *TRAININGS, *EXPERIMENTS}
    others = [c for c in ALL if c.page != "docs/serving.md"]  # other projects' commands, on GPUs
    assert [c for c in others if c not in tested and c.words[0] not in NOT_RUN] == []


def test_steps_are_those_of_the_demo() -> None:
    demo = (ROOT / "examples" / "demo.sh").read_text().replace("\\\n", " ")
    found = re.findall(r'^step "[^"]*" "[^"]*" +(.*)$', demo, flags=re.MULTILINE)
    assert [Command("", line).words for line in found] == [step.words for step in STEPS]
    assert len(STEPS) == 13


def test_what_the_readme_does_afterwards_is_run() -> None:
    """The slow test runs the same commands of docs/export-and-evaluate.md."""
    said = [c.words for c in commands("README.md") if "demo/" in c.line]
    assert len(said) == 4
    assert all(words in [c.words for c in AFTERWARDS] for words in said)


@pytest.mark.parametrize("command", [c for c in ALL if c.words[0] in ("make", "pip")], ids=str)
def test_targets_and_extras_exist(command: Command) -> None:
    if command.words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert re.search(rf"^{command.words[1]}:", makefile, flags=re.MULTILINE)
        return
    (package,) = command.words[2:]
    name, _, extras = package.strip("]").partition("[")
    assert name == "nemo-upcycle"
    project = (ROOT / "pyproject.toml").read_text()
    for extra in filter(None, extras.split(",")):
        assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE), extra


def test_data_steps_run_as_written(tmp_path: Path) -> None:
    for command in STEPS:
        if command.words[:2] == ["nemo-upcycle", "data"]:
            cli.run(tmp_path, *command.words)
    for file in ("documentation.idx", "documentation.bin", "sources.idx", "sources.bin"):
        assert (tmp_path / "demo" / "data" / file).stat().st_size > 0
    assert (tmp_path / "demo" / "tokenizer" / "tokenizer.json").exists()
    assert (tmp_path / "demo" / "task" / "next_line.yaml").exists()


def test_a_dense_model_becomes_a_directory_as_written(tmp_path: Path, tokenizer: Path) -> None:
    dense = write_llama(tmp_path / "demo" / "dense_hf", vocab_size=280)
    copy_tokenizer(tokenizer, dense)
    said = [cli.run(tmp_path, *c.words) for c in commands("docs/upcycle.md") if c in OURS]
    assert "would be written" in said[0] and "written to demo/moe" in said[1]
    assert "exact: both compute the same" in said[2]
    assert "16 in each of 4 of 4 layers, 4 per token; before 8 and 2" in said[3]
    assert "written to demo/moe-large" in said[4]


def test_a_router_gets_centroids_as_written(tmp_path: Path, tokenizer: Path) -> None:
    copy_tokenizer(tokenizer, write_llama(tmp_path / "demo" / "dense_hf", vocab_size=280))
    (tmp_path / "demo" / "data").mkdir()
    for name in ("documentation", "sources"):
        write(tmp_path / "demo" / "data" / f"{name}.jsonl", many(20))
    said = [cli.run(tmp_path, *c.words) for c in commands("docs/calibrate.md") if c in OURS]
    assert "4 layers, 8 clusters each" in said[0]
    assert "exact: experts are the dense layer" in said[1]


@pytest.mark.parametrize("command", OURS, ids=str)
def test_options_exist(command: Command) -> None:
    _, *arguments = command.words
    found: Any = typer.main.get_command(app)
    while hasattr(found, "commands"):
        found = found.commands[arguments.pop(0)]
    known = {name for parameter in found.params for name in parameter.opts}
    assert {word for word in arguments if word.startswith("-")} <= known


@pytest.mark.parametrize("command", EXPERIMENTS, ids=str)
def test_options_of_the_experiment_exist(command: Command) -> None:
    """`make test-slurm` runs it; see tests/end_to_end/test_slurm.py."""
    script = (ROOT / "examples" / "experiment.py").read_text()
    for word in command.words[1:]:
        if word.startswith("-") and " " not in word:
            assert f'"{word}"' in script, word


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A directory with the configs of the models that the documents take for any model."""
    (tmp_path / "Qwen3-8B").mkdir()
    config = ROOT / "tests" / "integration" / "recipes" / "configs" / "qwen3_8b.json"
    shutil.copyfile(config, tmp_path / "Qwen3-8B" / "config.json")
    (tmp_path / "my-400m").mkdir()
    (tmp_path / "my-400m" / "config.json").write_text(json.dumps(LLAMA_400M))
    return tmp_path


@pytest.mark.parametrize("command", TRAININGS, ids=str)
@pytest.mark.usefixtures("models")
def test_trainings_are_configured_as_written(tmp_path: Path, command: Command) -> None:
    words = [word for word in command.words if word not in ("--yes", "--dryrun")]
    output = cli.run(tmp_path, *words, "--dryrun")
    assert "Dry run for pretrain" in output
    if command not in STEPS:  # which start jobs
        assert "--dryrun" in command.words
        steps = 100 if "llama_tiny" in words[4] else 23842
        assert f"max_steps={steps}," in output
        assert (
            "RestoreConfig" if "restore_config" in command.line else "UpcyclingCallback"
        ) in output


@pytest.mark.parametrize("command", PREDICTED, ids=str)
@pytest.mark.usefixtures("models")
def test_predictions_are_printed_as_written(tmp_path: Path, command: Command) -> None:
    output = cli.run(tmp_path, *command.words)
    shown = "[rows, columns]" if "--rank" in command.words else SHOWS[command.words[1]]
    assert shown in output


def test_the_refusal_is_the_one_shown(models: Path) -> None:
    (shown,) = (block for block in code("docs/planner.md") if block.startswith("Error: Nothing"))
    words = ["--dense", "Qwen3-8B", "--gpus", "8", "optimizer_offload_fraction=0"]
    output = cli.run(models, "nemo-upcycle", "tune", *words)
    assert output.strip() == shown.strip()


def same_lines(shown: str, output: str) -> None:
    printed = [" ".join(line.split()) for line in output.splitlines()]
    for line in shown.splitlines():
        if line.strip(" ─"):
            assert " ".join(line.split()) in printed, line


def test_the_plan_is_the_one_shown(tmp_path: Path) -> None:
    (shown,) = (block for block in code("docs/planner.md") if block.startswith(" stage"))
    same_lines(shown, cli.run(tmp_path, "nemo-upcycle", "plan"))


def test_the_mappings_are_those_shown(tmp_path: Path) -> None:
    (shown,) = (block for block in code("docs/planner.md") if "MFU*" in block)
    command = "nemo-upcycle tune --gpus 128"
    assert f"`{command}`" in text("docs/planner.md")
    same_lines(shown, cli.run(tmp_path, *command.split()))


@pytest.mark.usefixtures("models")
def test_the_comparison_is_the_one_shown(tmp_path: Path) -> None:
    (shown,) = (block for block in code("docs/worth.md") if "dense on" in block)
    same_lines(shown, cli.run(tmp_path, *commands("docs/worth.md")[0].words))


def test_the_hardware_shown_is_taken(tmp_path: Path) -> None:
    (shown,) = code("docs/planner.md", "yaml")
    (tmp_path / "our.yaml").write_text(shown)
    words = ["nemo-upcycle", "tune", "--gpus", "64", "--hardware", "our.yaml"]
    assert "our cluster" in cli.run(tmp_path, *words)


def test_the_blend_shown_is_taken(tmp_path: Path) -> None:
    from nemo_upcycle.data.blend import read_blend

    (shown,) = code("docs/data.md", "yaml")
    (tmp_path / "my.yaml").write_text(shown)
    read_blend(str(tmp_path / "my.yaml"))


def test_the_initializer_shown_works(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_upcycle.initializers import make_initializer, registry

    monkeypatch.setattr(registry.EXPERTS, "_makers", dict(registry.EXPERTS._makers))
    (shown,) = code("docs/ways-of-upcycling.md", "python")
    exec(shown, {})
    make_initializer("flip(fraction=0.1)")


@pytest.mark.filterwarnings("ignore")  # of a dense checkpoint that is not there
def test_the_recipe_shown_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    import nemo_run

    made: list[Any] = []
    monkeypatch.setattr(nemo_run, "run", lambda recipe, direct: made.append(recipe))
    (shown,) = code("docs/running.md", "python")
    exec(shown, {"__name__": "__main__"})
    (recipe,) = made
    assert (recipe.log.name, recipe.trainer.max_steps) == ("e4t2", 20)
    assert recipe.trainer.callbacks[-1].__fn_or_cls__.__name__ == "UpcyclingCallback"


def without_nemo(directory: Path, name: str, *arguments: str) -> str:
    """Run a script, or a module, where NeMo cannot be imported."""
    run = "run_path" if name.endswith(".py") else "run_module"
    start = (
        "import runpy, sys; sys.modules.update(dict.fromkeys(['nemo', 'nemo_run', 'lightning'])); "
        f"sys.argv[0] = {name!r}; runpy.{run}({name!r}, run_name='__main__')"
    )
    return cli.run_script(directory, sys.executable, "-c", start, *arguments)


def test_the_public_names_are_all_there() -> None:
    import nemo_upcycle

    names, _ = code("docs/without-nemo.md", "python")
    found: dict[str, Any] = {}
    exec(names, found)
    assert set(nemo_upcycle.__all__) <= set(found)
    table = re.findall(r"^\| `(\w+)", text("docs/without-nemo.md"), flags=re.MULTILINE)
    assert set(nemo_upcycle.__all__) <= set(table)


def test_the_script_shown_runs_without_nemo(ranks: RankPool, dense: Path, tmp_path: Path) -> None:
    ranks.run(
        scenarios.trained_and_saved,
        1,
        dense=dense,
        folding=ParallelFolding(),
        upcycling=UpcyclingConfig(),
        directory=tmp_path / "saved",
        ids=tokens(rows=1, length=16),
    )
    _, script = code("docs/without-nemo.md", "python")
    (tmp_path / "script.py").write_text(script)
    output = without_nemo(tmp_path, "script.py", str(dense), "saved", "hf")
    assert "step 0 is exact" in output
    assert "tensors" in output
    assert (tmp_path / "hf" / "model.safetensors").exists()
    again = without_nemo(tmp_path, "script.py", str(dense), "saved", "hf")
    assert "Error: hf exists" in again


def test_commands_that_need_no_nemo(tmp_path: Path) -> None:
    def run(*words: str) -> str:
        return without_nemo(tmp_path, "nemo_upcycle.cli", *words)

    assert "step 0" in run("plan")
    assert "expert" in run("groups")
    assert "nemo llm pretrain" in run("tune", "--recipe", "llama32_1b_e8t2")
    document = '{"text": "An expert is a copy of the layer."}\n'
    (tmp_path / "some.jsonl").write_text(document * 20)
    run("data", "tokenizer", "some.jsonl", "--vocab-size", "280", "--out", "tokenizer")
    run("data", "tokenize", "some.jsonl", "--tokenizer", "tokenizer", "--out", "data")
    assert (tmp_path / "data" / "some.idx").exists()


def _in_shell(directory: Path, line: str) -> str:
    script = directory / "line.sh"
    script.write_text(f"#!/usr/bin/env bash\nset -e\n{line}\n")
    script.chmod(0o755)
    return cli.run_script(directory, str(script))


@pytest.mark.slow
def test_a_larger_model_is_imported_and_trained_as_written(tmp_path: Path) -> None:
    make_workspace(tmp_path / "demo")
    upcycles = [
        c for c in commands("docs/upcycle.md") if c.words[:2] == ["nemo-upcycle", "upcycle"]
    ]
    for command in upcycles:
        cli.run(tmp_path, *command.words)
    imported, trained = GROWN
    _in_shell(tmp_path, imported.line)
    line = trained.line.replace("from_scratch", "max_steps=2, from_scratch")
    output = _in_shell(tmp_path, line.replace("--dryrun", "--yes"))
    assert list((tmp_path / "demo" / "large" / "checkpoints").glob("*-last")), output


@pytest.mark.slow
def test_demo_runs_and_a_second_run_reuses_it(tmp_path: Path) -> None:
    demo = str(ROOT / "examples" / "demo.sh")
    output = cli.run_script(tmp_path, demo)
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
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "Step 0: exact" in page
    assert "No data." not in page
    said = [_in_shell(tmp_path, command.line) for command in AFTERWARDS]
    assert "MixtralForCausalLM" in said[0]
    assert "not exact: attention, norms" in said[3]
    assert said[4].count("acc") > 1
    again = cli.run_script(tmp_path, demo)
    assert again.count("done before, reused") == 13

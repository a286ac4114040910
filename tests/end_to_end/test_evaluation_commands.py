"""What users of `evaluate`, `verify` and `generate` can get wrong: one line, before the work."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemo_upcycle.cli import app
from nemo_upcycle.data.choices import write_choices
from tests.end_to_end import cli
from tests.workspace import make_workspace

pytest.importorskip("lm_eval")

TASK = ["--tasks", "next_line", "--include-path", "task"]
YAML = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: OUTPUT
doc_to_text: TEXT
doc_to_target: ''
metric_list: [{metric: METRIC}]
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint of context length 256 with its tokenizer, tasks, and what is amiss."""
    root = make_workspace(tmp_path_factory.mktemp("commands"))
    write_choices([root / "data" / "sources.jsonl"], root / "task", "next_line", 20, held_out=1.0)
    (root / "tasks").mkdir()
    for name, output, text, metric in (
        ("generating", "generate_until", "'{{context}}'", "exact_match"),
        ("faulty", "loglikelihood", "'{{context.nowhere.at_all}}'", "acc"),
    ):
        words = {"NAME": name, "OUTPUT": output, "TEXT": text, "METRIC": metric}
        words["FILE"] = str(root / "task" / "next_line.jsonl")
        said = YAML
        for word, value in words.items():
            said = said.replace(word, value)
        (root / "tasks" / f"{name}.yaml").write_text(said)
    (root / "tasks" / "broken.yaml").write_text("task: [broken\n")
    (root / "file").write_text("")
    (root / "empty.txt").write_text("")
    (root / "empty").mkdir()
    larger = Path(shutil.copytree(root / "tokenizer", root / "larger"))
    change_json(larger / "tokenizer.json", lambda tokenizer: add_token(tokenizer, "<more>", 512))
    other = Path(shutil.copytree(root / "dense_hf", root / "misshapen"))
    change_json(other / "config.json", lambda config: config.update(intermediate_size=100))
    shorter = Path(shutil.copytree(root / "dense_hf", root / "shorter"))
    change_json(shorter / "config.json", lambda config: config.update(max_position_embeddings=128))
    swapped = Path(shutil.copytree(root / "tokenizer", root / "swapped"))
    change_json(swapped / "tokenizer.json", lambda tokenizer: swap(tokenizer["model"]["vocab"]))
    other = Path(shutil.copytree(root / "dense_hf", root / "epsilon"))
    change_json(other / "config.json", lambda config: config.update(rms_norm_eps=1.0001e-5))
    running = Path(shutil.copytree(root / "dense_hf", root / "running"))
    change_json(running / "config.json", lambda config: config.update(RUNNING))
    for name, eos in (("no_end", []), ("end_in_words", "2")):
        ending = Path(shutil.copytree(root / "dense_hf", root / name))
        (ending / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    hot = Path(shutil.copytree(root / "dense_hf", root / "hot"))
    (hot / "generation_config.json").write_text('{"temperature": "hot"}')
    unread = Path(shutil.copytree(root / "dense_hf", root / "unread"))
    (unread / "generation_config.json").write_text("{")
    (root / "piqa.json").write_text(json.dumps({"results": {"piqa": {}}, "n-shot": {}}))
    return root


def swap(vocabulary: dict) -> None:
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


RUNNING = {
    "return_dict": False,
    "torchscript": True,
    "output_hidden_states": "yes",
    "_attn_implementation": "flash_attention_2",
    "torch_dtype": "float99",
}
"""What changes how transformers runs a model, and not what it computes."""


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def add_token(tokenizer: dict, content: str, number: int) -> None:
    token = dict(tokenizer["added_tokens"][0], id=number, content=content)
    tokenizer["added_tokens"].append(token)


EVALUATE = ["evaluate", "dense_hf"]
WRONG = {
    "no question": ([*EVALUATE, *TASK, "--limit", "0"], "--limit is 0; expected 1 or more"),
    "fewer questions than none": ([*EVALUATE, *TASK, "--limit", "-3"], "--limit is -3"),
    "fewer examples than none": (
        [*EVALUATE, *TASK, "--num-fewshot", "-1"],
        "--num-fewshot is -1; expected 0 or more",
    ),
    "more examples than there are": (
        [*EVALUATE, *TASK, "--num-fewshot", "1000"],
        "The task next_line cannot be asked with 1000 examples",
    ),
    "no row at a time": ([*EVALUATE, *TASK, "--batch-size", "0"], "--batch-size is 0"),
    "rows of no token": ([*EVALUATE, *TASK, "--max-length", "0"], "--max-length is 0"),
    "rows longer than the context": (
        [*EVALUATE, *TASK, "--max-length", "300"],
        "--max-length is 300; expected at most the context length of dense_hf, 256",
    ),
    "a dtype that is none": ([*EVALUATE, *TASK, "--dtype", "float8"], "dtype is 'float8'"),
    "no task": ([*EVALUATE, "--tasks", ""], "No task is named"),
    "a comma for a task": ([*EVALUATE, "--tasks", " , "], "No task is named"),
    "no directory of tasks": (
        [*EVALUATE, "--tasks", "mine", "--include-path", "nowhere"],
        "nowhere is no directory",
    ),
    "a task that is no YAML": (
        [*EVALUATE, "--tasks", "broken", "--include-path", "tasks"],
        "tasks/broken.yaml cannot be read: ",
    ),
    "a task whose template fails": (
        [*EVALUATE, "--tasks", "faulty", "--include-path", "tasks"],
        "The task faulty cannot be loaded: UndefinedError",
    ),
    "a task that fills the row": (
        [*EVALUATE, "--tasks", "generating", "--include-path", "tasks"],
        "generating lets the model make 256 tokens (max_gen_toks), of the 256 that a row has",
    ),
    "no chat template": ([*EVALUATE, *TASK, "--apply-chat-template"], "has no chat template"),
    "no tokenizer": ([*EVALUATE, *TASK, "--tokenizer", "empty"], "empty holds no tokenizer"),
    "a tokenizer with more tokens": (
        [*EVALUATE, *TASK, "--tokenizer", "larger"],
        "1 tokens that dense_hf has no embedding for ('<more>' is 512)",
    ),
    "no place for results": (
        [*EVALUATE, *TASK, "--out", "file/evaluation"],
        "file/evaluation cannot be written to: Not a directory",
    ),
    "a file for a directory": ([*EVALUATE, *TASK, "--out", "file"], "file cannot be written to"),
    "several checkpoints": (
        ["evaluate", "dense_hf", "unread", *TASK],
        "2 checkpoints were given: dense_hf, unread; expected one",
    ),
    "a dense model that does not fit its config": (
        [*EVALUATE, *TASK, "--dense", "misshapen"],
        "12 of the wrong shape",
    ),
    "earlier results of other tasks": (
        [*EVALUATE, *TASK, "--dense", "piqa.json"],
        "piqa.json has results of piqa",
    ),
    "no earlier results": (
        [*EVALUATE, *TASK, "--dense", "nowhere.json"],
        "nowhere.json cannot be read",
    ),
    "text that is empty": (
        ["verify", "dense_hf", "dense_hf", "--text", "empty.txt"],
        "The text has 0 tokens",
    ),
    "text that is not there": (
        ["verify", "dense_hf", "dense_hf", "--text", "nowhere.txt"],
        "nowhere.txt cannot be read as text",
    ),
    "no token to compare": (
        ["verify", "dense_hf", "dense_hf", "--tokens", "0"],
        "--tokens is 0; expected 1 or more",
    ),
    "several MoEs": (["verify", "dense_hf", "dense_hf", "unread"], "2 checkpoints were given"),
    "a prompt without a token": (["generate", "dense_hf", ""], "The prompt is empty"),
    "a prompt as long as the context": (
        ["generate", "dense_hf", "import os\n" * 200],
        "expected fewer than the model's context length, 256",
    ),
    "no token to make": (
        ["generate", "dense_hf", "def", "--max-new-tokens", "0"],
        "--max-new-tokens is 0; expected 1 or more",
    ),
    "a temperature below zero": (
        ["generate", "dense_hf", "def", "--temperature", "-1"],
        "--temperature is -1; expected 0 or more",
    ),
    "a directory for a file": (
        ["generate", "dense_hf", "def", "--out", "empty"],
        "empty is a directory; expected a file",
    ),
    "no place for the text": (
        ["generate", "dense_hf", "def", "--out", "file/text"],
        "file cannot be written to",
    ),
    "several checkpoints to generate with": (
        ["generate", "dense_hf", "unread", "def"],
        "2 checkpoints were given",
    ),
    "a tokenizer that is nowhere": (
        [*EVALUATE, *TASK, "--tokenizer", "nowhere"],
        "no tokenizer directory at nowhere",
    ),
    "a tokenizer that is nowhere, to generate with": (
        ["generate", "dense_hf", "def", "--tokenizer", "nowhere"],
        "no tokenizer directory at nowhere",
    ),
    "a tokenizer that is nowhere, to verify with": (
        ["verify", "dense_hf", "dense_hf", "--tokenizer", "nowhere"],
        "no tokenizer directory at nowhere",
    ),
    "no token that ends texts": (
        ["generate", "no_end", "def"],
        "generation_config.json says eos_token_id=[]; expected the id of a token",
    ),
    "an ending token in words": (
        ["generate", "end_in_words", "def"],
        "generation_config.json says eos_token_id='2'; expected the id of a token",
    ),
    "a temperature in words": (
        ["generate", "hot", "def"],
        "generation_config.json says temperature='hot'; expected a number",
    ),
    "a generation config that is no JSON": (
        ["generate", "unread", "def"],
        "generation_config.json cannot be read",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line_before_the_work(
    workspace: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, message = WRONG[name]
    monkeypatch.chdir(workspace)
    for variable in ("HF_HUB_OFFLINE", "TQDM_MININTERVAL"):
        monkeypatch.setenv(variable, "1")  # what the command sets, undone afterwards
    before = sorted(workspace.rglob("*"))
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.exception
    lines = result.output.strip().splitlines()
    lines = list(filter(None, lines))
    assert len(lines) == 1, result.output
    assert lines[0].startswith("Error: ")
    assert message in lines[0]
    assert sorted(workspace.rglob("*")) == before


def test_a_text_longer_than_a_row_is_named(workspace: Path) -> None:
    """lm-eval cuts what stands before a text, never the text."""
    said = cli.run(
        workspace,
        "nemo-upcycle",
        "evaluate",
        "dense_hf",
        *TASK,
        "--max-length",
        "2",
        "--limit",
        "3",
    )
    assert "Traceback" not in said
    line = said.strip().splitlines()[-1]
    assert re.fullmatch(r"Error: A text to score has \d+ tokens, and a row 2: .*", line)


@pytest.mark.thorough
def test_several_ranks_say_it_once(workspace: Path) -> None:
    """What only the ranks find out: NaN in the weights."""
    from safetensors.torch import load_file, save_file

    damaged = Path(shutil.copytree(workspace / "dense_hf", workspace / "damaged"))
    weights = load_file(damaged / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    words = ("nemo-upcycle", "generate", "damaged", "def", "--tp", "2")
    said = cli.run(workspace, *words)
    (line,) = said.strip().splitlines()
    assert line.startswith("Error: Tensor model.norm.weight of damaged holds NaN or Inf")


def test_results_are_there_before_the_dense_model_is_begun(workspace: Path) -> None:
    """The dense model cannot be loaded; the checkpoint's scores stay."""
    from safetensors.torch import load_file, save_file

    damaged = Path(shutil.copytree(workspace / "dense_hf", workspace / "dense_nan"))
    weights = load_file(damaged / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    said = cli.run(
        workspace,
        *("nemo-upcycle", "evaluate", "dense_hf", *TASK, "--limit", "3"),
        *("--dense", "dense_nan", "--out", "kept"),
    )
    assert said.strip().splitlines()[-1].startswith("Error: Tensor model.norm.weight of dense_nan")
    results = json.loads((workspace / "kept" / "results.json").read_text())
    assert results["n-samples"]["next_line"]["effective"] == 3
    assert os.listdir(workspace / "kept") == ["results.json"]


def test_models_of_other_context_lengths_are_given_rows_of_one(workspace: Path) -> None:
    words = ["nemo-upcycle", "evaluate", "dense_hf", *TASK, "--limit", "5"]
    said = cli.run(workspace, *words, "--dense", "shorter", "--out", "cut")
    assert "Rows are cut at 128 tokens." in said
    results, dense = (
        json.loads((workspace / "cut" / f"{name}.json").read_text())
        for name in ("results", "dense")
    )
    assert results["results"] == dense["results"]
    assert results["config"]["max_length"] == dense["config"]["max_length"] == 128
    assert "Rows are cut at 128 tokens." in (workspace / "cut" / "scores.md").read_text()


def test_what_is_made_ends_at_the_context_length(workspace: Path) -> None:
    words = ("nemo-upcycle", "generate", "shorter", "def main(", "--max-new-tokens", "200")
    said = cli.run(workspace, *words)
    note, *made = said.strip().splitlines()
    found = re.fullmatch(
        r"--max-new-tokens is 200; generating (\d+), because the prompt has (\d+) tokens and "
        r"the model's context length is 128",
        note,
    )
    assert found and int(found[1]) + int(found[2]) == 128
    assert made[0].startswith("def main(")


def said_by(workspace: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.chdir(workspace)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_what_changes_how_a_model_runs_is_set_here(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("def main(", "--max-new-tokens", "8")
    expected = said_by(workspace, monkeypatch, "generate", "dense_hf", *words)
    assert said_by(workspace, monkeypatch, "generate", "running", *words) == expected
    assert "  exact: " in said_by(workspace, monkeypatch, "verify", "dense_hf", "running")


def test_another_tokenizer_is_said(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tokens with other ids: nothing else shows it."""
    told = "the tokenizer swapped gives texts other tokens than dense_hf, the one beside dense_hf"
    words = ("generate", "dense_hf", "def", "--max-new-tokens", "2", "--tokenizer")
    assert told in said_by(workspace, monkeypatch, *words, "swapped")
    assert "other tokens" not in said_by(workspace, monkeypatch, *words, "tokenizer")


def test_numbers_that_no_text_shows_are_not_exact(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = said_by(workspace, monkeypatch, "verify", "dense_hf", "epsilon", "--no-weights")
    assert "not exact: its layernorm_epsilon is 1.0001e-05, the dense model's 1e-05" in said

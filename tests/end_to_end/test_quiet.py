"""Commands print their own output alone: not a word of the libraries that they import."""

import re
from pathlib import Path

import pytest

from tests.end_to_end import cli
from tests.moe_checkpoints import KINDS, moe_weights, save_moe
from tests.workspace import make_workspace

OURS = re.compile(
    r"\S+: \d+%.* left"  # progress
    r"|Note: .*"
    r"|\S+ → .*|  (experts|weights|step 0|loss|KL|top-1|logits|rounding) .*|  (not )?exact.*"
    r"|demo/tokens/documentation: 150 documents, \d+ tokens"
    r"|exported: MixtralForCausalLM, \d+ tensors, .* MiB"
    r"|(demo/task/\w+|evaluation/\w+)\.(yaml|json|md)(: 50 questions)?"
    r"|Scores +|[┏┡│└┃].*|Rows are cut at 256 tokens\."
    # Progress of lm-eval, which is what takes long.
    r"|.*\d+%\|.*(it/s|s/it|\?it)\].*"
)

COMMANDS = {
    "data tokenize": "data tokenize demo/data/documentation.jsonl --tokenizer demo/tokenizer "
    "--out demo/tokens",
    "data choices": "data choices demo/data/documentation.jsonl --items 50 --out demo/task",
    "upcycle": "upcycle demo/dense_hf upcycled",
    "export": "export trained exported",
    "verify": "verify demo/dense_hf upcycled --tokens 256",
    "evaluate": "evaluate upcycled --tasks next_line --include-path demo/task --limit 2",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Run the commands one after the other; return the lines that each printed."""
    directory = tmp_path_factory.mktemp("quiet")
    make_workspace(directory / "demo")
    save_moe(directory / "trained", KINDS["plain"], moe_weights(KINDS["plain"]))
    return {name: lines(directory, words) for name, words in COMMANDS.items()}


def lines(directory: Path, words: str) -> list[str]:
    return cli.run(directory, "nemo-upcycle", *words.split()).splitlines()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_prints_what_is_its_own(said: dict[str, list[str]], name: str) -> None:
    assert said[name]
    assert [line for line in said[name] if line and not OURS.fullmatch(line)] == []


def test_generate_prints_the_text_alone(tmp_path: Path) -> None:
    make_workspace(tmp_path / "demo")
    printed = lines(tmp_path, "generate demo/dense_hf def --max-new-tokens 2 --out text")
    assert printed == (tmp_path / "text").read_text().splitlines()


def test_verbose_prints_what_the_libraries_say(tmp_path: Path) -> None:
    make_workspace(tmp_path / "demo")
    printed = lines(tmp_path, f"-v {COMMANDS['data tokenize']}")
    assert [line for line in printed if "site-packages" in line]

"""Commands print their own output alone: not a word of the libraries that they import."""

import json
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
    "generate": "generate demo/dense_hf def --max-new-tokens 2 --out text",
}

ONE_PROCESS = """
import json, os, sys
from nemo_upcycle.cli import main

for name, words in json.loads(sys.argv[1]).items():
    file = os.open(name, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv[1:] = words.split()
    try:
        main()
    except SystemExit:
        sys.stdout.flush()
"""
"""All commands, each with a file for its output. A library is imported by the first that needs it.

That is no other proof than a process per command, which takes a minute: the same `one_line_errors`
is around all commands, and nothing heavy is imported before (`test_commands.py`).
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Run the commands one after the other; return the lines that each printed."""
    directory = tmp_path_factory.mktemp("quiet")
    make_workspace(directory / "demo")
    save_moe(directory / "trained", KINDS["plain"], moe_weights(KINDS["plain"]))
    assert cli.run(directory, "python", "-c", ONE_PROCESS, json.dumps(COMMANDS)) == ""
    printed = {name: (directory / name).read_text().splitlines() for name in COMMANDS}
    return printed | {"generated": (directory / "text").read_text().splitlines()}


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "generate"])
def test_a_command_prints_what_is_its_own(said: dict[str, list[str]], name: str) -> None:
    assert said[name]
    assert [line for line in said[name] if line and not OURS.fullmatch(line)] == []


def test_generate_prints_the_text_alone(said: dict[str, list[str]]) -> None:
    assert said["generate"] == said["generated"]


@pytest.mark.thorough
def test_verbose_prints_what_the_libraries_say(tmp_path: Path) -> None:
    make_workspace(tmp_path / "demo")
    words = f"nemo-upcycle -v {COMMANDS['data tokenize']}".split()
    assert "site-packages" in cli.run(tmp_path, *words, forked=False)

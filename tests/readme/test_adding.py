"""docs/adding.md, followed word by word on a copy of the package, adds a family and a recipe."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from tests.tiny import write_llama

ROOT = Path(__file__).parents[2]
STEP = re.compile(r"^\d\. `([\w/.]+)`(?:(?!^\d\. ).)*?^   ```(\w+)\n(.*?)^   ```$", re.M | re.S)
NAMES = {"gate_proj": "wg", "up_proj": "wu", "down_proj": "wd"}


def steps() -> list[tuple[str, str, str]]:
    """Return the file, the kind and the content of each block."""
    page = (ROOT / "docs" / "adding.md").read_text()
    found = [(file, kind, dedent(block)) for file, kind, block in STEP.findall(page)]
    assert [kind for _, kind, _ in found] == ["python", "diff", "diff", "json", "diff"]
    return found


def apply(diff: str, text: str) -> str:
    """Apply a diff without line numbers, whose lines stand in one place."""
    lines = diff.splitlines()
    old, new = (
        "\n".join(line[1:] for line in lines if not line.startswith(other)) for other in ("+", "-")
    )
    assert text.count(old) == 1, f"{text.count(old)} places for:\n{old}"
    return text.replace(old, new)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package and the recipes with what the page adds."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("nemo_upcycle", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name, kind, block in steps():
        file = tmp_path / name
        if kind == "diff":
            file.write_text(apply(block, file.read_text()))
        else:
            assert not file.exists()
            file.write_text(block)
    (tmp_path / "nemo_upcycle_recipes").symlink_to(tmp_path / "recipes")
    return tmp_path


def toy_checkpoint(directory: Path) -> Path:
    """A Llama under the names that the page gives."""
    from safetensors.torch import load_file, save_file

    write_llama(directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "toy", "architectures": ["ToyForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(config))
    pattern = re.compile("|".join(NAMES))
    tensors = load_file(directory / "model.safetensors")
    renamed = {pattern.sub(lambda m: NAMES[m[0]], name): v for name, v in tensors.items()}
    save_file(renamed, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_the_page_adds_a_family_and_a_recipe(copy: Path) -> None:
    def command(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "nemo_upcycle.cli", *words],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy), "COLUMNS": "200"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    dense = toy_checkpoint(copy / "dense")
    said = command("plan", "--recipe", "llama_tiny_e8t2", "--dense", str(dense))
    assert "headers read and checked" in said
    assert "wg" in said and "gate_proj" not in said
    assert "toy_1b_e8t2" in command("plan", "--recipe", "toy_1b_e8t2")


def test_a_diff_that_fits_nowhere_is_seen() -> None:
    with pytest.raises(AssertionError, match="0 places"):
        apply(" a\n+b\n", "c\n")

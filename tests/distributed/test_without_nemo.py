"""What `pip install nemo-upcycle` brings works where NeMo, NeMo-Run and Lightning are not."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from tests.distributed import scenarios
from tests.distributed.pool import RankPool
from tests.tiny import write_llama
from tests.tokenizers import write_tokenizer

ROOT = Path(__file__).parents[2]
FORBIDDEN = ("nemo", "nemo_run", "lightning", "fiddle", "lm_eval")
BLOCK = f"""
import sys

class NotInstalled:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {FORBIDDEN}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, NotInstalled())
"""
API = """
from nemo_upcycle import (
    ParallelFolding, UpcyclingConfig, UpcyclingError, export, open_dense, plan,
    register_initializer, register_router_initializer, upcycle,
)
job = plan(open_dense("dense"), UpcyclingConfig(), ParallelFolding(), 1, 2)
print(job.parameters)
"""


@pytest.fixture(scope="module")
def models(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, and an MoE of it as NeMo 2 saves one."""
    directory = tmp_path_factory.mktemp("without_nemo")
    dense = write_llama(directory / "dense", vocab_size=512)
    of_moe = {"folding": ParallelFolding(), "upcycling": UpcyclingConfig()}
    ranks.run(
        scenarios.upcycled_and_saved_as_nemo, 1, dense=dense, directory=directory / "moe", **of_moe
    )
    return directory


@pytest.fixture(scope="module")
def blocked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python that finds no NeMo."""
    directory = tmp_path_factory.mktemp("blocked")
    (directory / "sitecustomize.py").write_text(BLOCK)
    path = os.pathsep.join((str(directory), *filter(None, [os.environ.get("PYTHONPATH")])))
    return os.environ | {"PYTHONPATH": path}


def works(python: Path | str, models: Path, environment: dict[str, str]) -> None:
    """Run commands, the API and the engine."""

    def run(*words: str | Path) -> str:
        done = subprocess.run(
            [str(python), "-W", "ignore", *map(str, words)],
            cwd=models,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def command(*words: str | Path) -> str:
        return run("-m", "nemo_upcycle.cli", *words)

    assert "bytes" not in command("version")
    assert "job reads" in command("plan", "--recipe", "llama_tiny_e8t2", "--dense", "dense")
    assert "mapping" in command("tune", "--recipe", "llama32_1b_e8t2", "--gpus", "8")
    assert "TP" in command("groups", "--recipe", "llama3_8b_e8t2")
    out = models / f"hf-{len(list(models.iterdir()))}"
    assert "MixtralForCausalLM" in command("export", "moe", out)
    assert (out / "model.safetensors").is_file()
    assert int(run("-c", API)) > 0
    assert "step 0            exact" in run(ROOT / "examples" / "without_nemo.py", "dense")


def test_what_needs_no_nemo_works_without(models: Path, blocked: dict[str, str]) -> None:
    works(sys.executable, models, blocked)


def ran(models: Path, environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command that runs a model."""
    write_tokenizer(models / "tokenizer", "BPE")
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "nemo_upcycle.cli", *words],
        cwd=models,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.thorough
def test_models_run_without_nemo(models: Path, blocked: dict[str, str]) -> None:
    done = ran(models, blocked, "verify", "dense", "moe", "--tokenizer", "tokenizer", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["exact"]


def test_what_is_not_installed_is_said(models: Path, blocked: dict[str, str]) -> None:
    done = ran(models, blocked, "evaluate", "moe", "--tokenizer", "tokenizer", "--tasks", "mmlu")
    assert done.returncode == 1
    assert "pip install 'nemo-upcycle[eval]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_it_is_installed_without_nemo(models: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt")
    subprocess.run([*map(str, pip), str(ROOT)], check=True)
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
    listed = subprocess.check_output([str(python), "-m", "pip", "list"], text=True).split()
    assert not {"nemo-toolkit", "nemo_run", "nemo-run", "lightning"} & set(listed)
    works(python, models, environment)

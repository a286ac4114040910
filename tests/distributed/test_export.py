"""Exported models compute in transformers what they compute in Megatron."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from nemo_upcycle.checkpoint.kept import kept_of
from nemo_upcycle.cli import app
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.trained.export import export, plan_export
from tests.distributed import scenarios
from tests.distributed.pool import RankPool, nemo_recipe
from tests.distributed.step0 import FOLDED, IDS, TOLERANCE, error
from tests.distributed.trained import KINDS, NOT_EXPORTED, trained
from tests.distributed.training import train
from tests.distributed.whole import whole
from tests.thorough import thorough_but
from tests.tiny import write_dense
from tests.workspace import make_workspace

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
TOOLS_TEMPLATE = "{{ tools }}"
TOKENS = {"bos_token_id": 3, "eos_token_id": [7, 9], "pad_token_id": 5}
GENERATION = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "bos_token_id": 3,
    "eos_token_id": [7, 9, 11],
    "pad_token_id": 5,
    "transformers_version": "4.40.0",
}


@pytest.mark.parametrize("kind", thorough_but(KINDS, "plain", "everything", "sigmoid, everything"))
def test_logits_equal_megatrons(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    saved, outputs = trained(ranks, tmp_path, kind, FOLDED, 4)
    exported = tmp_path / "exported"
    export(saved, exported)
    assert json.loads((exported / "config.json").read_text())["model_type"] == KINDS[kind][0]
    assert error(outputs, exported, IDS) <= TOLERANCE


def test_the_same_file_from_any_mapping(ranks: RankPool, tmp_path: Path) -> None:
    files = []
    for name, world_size, folding in (
        ("1", 1, ParallelFolding()),
        ("4", 4, FOLDED),
        ("ETP", 2, ParallelFolding(expert_tensor_parallel_size=2)),
    ):
        dense = write_dense(tmp_path / "dense", "llama")
        ranks.run(
            scenarios.upcycled_and_saved_as_nemo,
            world_size,
            dense=dense,
            folding=folding,
            upcycling=UpcyclingConfig(initializer="noise"),
            directory=tmp_path / name,
        )
        export(tmp_path / name, tmp_path / f"{name}-hf")
        files.append((tmp_path / f"{name}-hf" / "model.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]


def test_swapped_gate_and_up_are_seen(ranks: RankPool, tmp_path: Path) -> None:
    saved, outputs = trained(ranks, tmp_path, "plain", ParallelFolding(), 1)
    export(saved, tmp_path / "exported")
    file = tmp_path / "exported" / "model.safetensors"
    tensors = load_file(file)
    swap = {"w1": "w3", "w3": "w1"}
    swapped = {
        ".".join(swap.get(word, word) for word in name.split(".")): values
        for name, values in tensors.items()
    }
    save_file(swapped, file, {"format": "pt"})
    assert error(outputs, tmp_path / "exported", IDS) > 100 * TOLERANCE


def test_many_files(ranks: RankPool, tmp_path: Path) -> None:
    saved, outputs = trained(ranks, tmp_path, "plain", ParallelFolding(), 1)
    seen: list[tuple[int, int]] = []
    exported = tmp_path / "exported"
    plan = export(saved, exported, lambda *at: seen.append(at), shard_bytes=300_000)
    files = list(exported.glob("model-*.safetensors"))
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert len(files) > 3
    assert index["metadata"]["total_size"] == plan.bytes == seen[-1][0] == seen[-1][1]
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert error(outputs, exported, IDS) <= TOLERANCE


@pytest.mark.parametrize("name", NOT_EXPORTED)
def test_what_no_architecture_computes_is_refused(
    ranks: RankPool, tmp_path: Path, name: str
) -> None:
    family, upcycling, message = NOT_EXPORTED[name]
    ranks.run(
        scenarios.upcycled_and_saved_as_nemo,
        1,
        dense=write_dense(tmp_path / "dense", family),
        folding=ParallelFolding(),
        upcycling=UpcyclingConfig(**upcycling),
        directory=tmp_path / "saved",
    )
    with pytest.raises(UpcyclingError, match=message):
        export(tmp_path / "saved", tmp_path / "exported")
    assert not list(tmp_path.glob("exported*"))


def test_routers_that_transformers_has_not_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    saved, _ = trained(ranks, tmp_path, "plain", ParallelFolding(), 1)
    assert plan_export(saved).capacity_factor is None
    model = saved / "context" / "model.yaml"
    text = model.read_text()
    for name, usual, value in (
        ("moe_router_score_function", "softmax", "sqrtsoftplus"),
        ("moe_router_topk_scaling_factor", "null", "2.5"),
    ):
        assert f"{name}: {usual}" in text
        model.write_text(text.replace(f"{name}: {usual}", f"{name}: {value}"))
        with pytest.raises(UpcyclingError, match=name):
            plan_export(saved)
    for factor, said in (("1.0", 1.0), ("4.0", None)):
        field = "moe_expert_capacity_factor: "
        model.write_text(text.replace(f"{field}null", field + factor))
        assert plan_export(saved).capacity_factor == said


def test_errors_leave_nothing(ranks: RankPool, tmp_path: Path) -> None:
    saved, _ = trained(ranks, tmp_path, "plain", ParallelFolding(), 1)
    (tmp_path / "there").mkdir()
    with pytest.raises(UpcyclingError, match="exists"):
        export(saved, tmp_path / "there")
    model = saved / "context" / "model.yaml"
    model.write_text(
        model.read_text().replace("moe_ffn_hidden_size: 96", "moe_ffn_hidden_size: 48")
    )
    with pytest.raises(UpcyclingError, match="do not belong together"):
        plan_export(saved)
    model.write_text(model.read_text().replace("num_moe_experts: 8", "num_moe_experts: null"))
    with pytest.raises(UpcyclingError, match="of a dense model"):
        plan_export(saved)


def test_what_a_killed_export_left_is_replaced(ranks: RankPool, tmp_path: Path) -> None:
    saved, _ = trained(ranks, tmp_path, "plain", ParallelFolding(), 1)
    (tmp_path / "exported.partial").mkdir()
    (tmp_path / "exported.partial" / "model.safetensors").write_bytes(b"half")
    export(saved, tmp_path / "exported")
    assert not (tmp_path / "exported.partial").exists()
    assert torch.isfinite(
        load_file(tmp_path / "exported" / "model.safetensors")["lm_head.weight"]
    ).all()


@nemo_recipe
def exported_by_nemo(checkpoint: Path, directory: Path) -> None:
    """Export as `llm.export_ckpt` does."""
    from nemo.collections import llm

    llm.export_ckpt(checkpoint, "hf", directory, overwrite=True)


@pytest.mark.parametrize("way", ["command", "NeMo"])
def test_a_checkpoint_of_a_real_run(
    ranks: RankPool, run: tuple[Path, Any], tmp_path: Path, way: str
) -> None:
    """Trained by NeMo on 2 ranks, with its tokenizer."""
    (checkpoint,), results = run
    assert not list(checkpoint.glob("context/*/*.safetensors")), "NeMo copied the dense weights"
    exported = tmp_path / "exported"
    if way == "command":
        result = CliRunner().invoke(app, ["export", str(checkpoint), str(exported)])
        assert result.exit_code == 0, result.output
        assert "MixtralForCausalLM" in result.output
    else:
        ranks.run(exported_by_nemo, 1, checkpoint=checkpoint, directory=exported)
    parameters = whole(shard for _, shards in results for shard in shards)
    tensors = load_file(exported / "model.safetensors")
    for expert in range(8):
        name = f"decoder.layers.1.mlp.experts.{expert}.linear_"
        prefix = f"model.layers.1.block_sparse_moe.experts.{expert}."
        gate, up = parameters[name + "fc1.weight"].chunk(2)
        assert torch.equal(tensors[prefix + "w1.weight"], gate)
        assert torch.equal(tensors[prefix + "w3.weight"], up)
        assert torch.equal(tensors[prefix + "w2.weight"], parameters[name + "fc2.weight"])
    model = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    inputs = tokenizer("def main():", return_tensors="pt")["input_ids"]
    generated = model.generate(inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert generated.shape[1] == inputs.shape[1] + 5
    # What the dense model's files say; the run's sequences were shorter.
    assert model.config.max_position_embeddings == 256
    assert {name: getattr(model.config, name) for name in TOKENS} == TOKENS
    assert json.loads((exported / "generation_config.json").read_text()) == GENERATION
    assert model.generation_config.eos_token_id == GENERATION["eos_token_id"]
    assert tokenizer.chat_template == {"default": CHAT_TEMPLATE, "tools": TOOLS_TEMPLATE}


def test_all_that_open_a_run_take_the_dense_models_context(
    ranks: RankPool, run: tuple[Path, Any]
) -> None:
    """lm-eval and `verify` cut rows at what the model's config says."""
    (checkpoint,), _ = run
    dense = checkpoint.parents[2] / "dense_hf"
    for source in (dense, checkpoint, checkpoint.parents[1]):
        assert ranks.run(context_length, 1, source=source) == [256], source


@nemo_recipe
def context_length(source: Path) -> int:
    from nemo_upcycle.evaluation.opening import open_model

    return open_model(source).config.max_position_embeddings


def test_a_runs_directory_is_its_last_checkpoint(run: tuple[Path, Any], tmp_path: Path) -> None:
    (checkpoint,), _ = run
    copied = tmp_path / "run" / "checkpoints"
    for step in (1, 9, 10):
        name = checkpoint.name.replace("step=1-", f"step={step}-")
        shutil.copytree(checkpoint, copied / name)
    (copied / name / "weights" / "metadata.json").unlink()
    for source in (tmp_path / "run", copied):
        target = tmp_path / f"{source.name}_hf"
        result = CliRunner().invoke(app, ["export", str(source), str(target)])
        assert result.exit_code == 0, result.output
        assert "taking its last complete checkpoint" in result.output
        assert "step=9-" in result.output
        assert target.exists()


def test_what_contradicts_is_told_once(run: tuple[Path, Any], tmp_path: Path) -> None:
    """The tokenizer's last token is another than the configs'; each is kept."""
    (checkpoint,), _ = run
    notes = export(checkpoint, tmp_path / "hf").notes
    (said,) = [note for note in notes if "eos_token_id" in note]
    assert "that of config.json and generation_config.json 7 (" in said
    assert "each is kept" in said
    assert not [note for note in notes if "has no record" in note]


def test_what_cannot_be_written_is_one_line_before_the_work(
    run: tuple[Path, Any], tmp_path: Path
) -> None:
    (checkpoint,), _ = run
    (tmp_path / "file").write_text("")
    seen: list[int] = []
    for target in (tmp_path / "file" / "hf", Path("/proc/hf")):
        with pytest.raises(UpcyclingError, match="cannot be written"):
            export(checkpoint, target, lambda done, total: seen.append(done))
    assert not seen
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_nothing(run: tuple[Path, Any], tmp_path: Path) -> None:
    (checkpoint,), _ = run

    def full(done: int, total: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UpcyclingError, match="No space left on device"):
        export(checkpoint, tmp_path / "new" / "hf", full)
    assert not list(tmp_path.iterdir())


def record(saved: Path, dense: Path | None, seq_length: int) -> None:
    """Make of a checkpoint one of a run with short sequences, upcycled from `dense`."""
    model = saved / "context" / "model.yaml"
    config = yaml.safe_load(model.read_text())
    config["config"] |= {"seq_length": seq_length, "window_size": None}
    model.write_text(yaml.safe_dump(config))
    common = torch.load(saved / "weights" / "common.pt", weights_only=False)
    kept = {"UpcyclingCallback": {"kept": kept_of(dense)}} if dense else {}
    torch.save(common | {"callbacks": kept}, saved / "weights" / "common.pt")


def test_a_window_that_is_longer_than_the_runs_sequences(ranks: RankPool, tmp_path: Path) -> None:
    """Megatron's config has none then, and the MoE has it all the same."""
    saved, outputs = trained(ranks, tmp_path, "window", FOLDED, 4)
    record(saved, tmp_path / "dense", seq_length=16)
    export(saved, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["sliding_window"], config["max_position_embeddings"]) == (16, 128)
    assert error(outputs, tmp_path / "hf", IDS) <= TOLERANCE
    # Trained on longer sequences without one, it has none.
    record(saved, tmp_path / "dense", seq_length=32)
    assert plan_export(saved).model.arch.sliding_window is None


def test_what_an_older_checkpoint_does_not_say_is_assumed_aloud(
    ranks: RankPool, tmp_path: Path
) -> None:
    saved, _ = trained(ranks, tmp_path, "plain", ParallelFolding(), 1)
    record(saved, None, seq_length=64)
    (note,) = export(saved, tmp_path / "hf").notes
    assert "max_position_embeddings is the run's 64, there is no sliding window" in note


@pytest.mark.parametrize("kind", ["plain", "softmax first"])
@pytest.mark.parametrize("said", [True, False], ids=["said", "unsaid"])
def test_tokens_whatever_architecture_it_becomes(
    ranks: RankPool, tmp_path: Path, kind: str, said: bool
) -> None:
    """What transformers takes for a Llama unsaid is not what it takes for a Qwen2-MoE."""
    saved, _ = trained(ranks, tmp_path, kind, ParallelFolding(), 1)
    config_file = tmp_path / "dense" / "config.json"
    config = json.loads(config_file.read_text())
    for name in TOKENS:
        config.pop(name, None)
    config_file.write_text(json.dumps(config | (TOKENS if said else {})))
    (tmp_path / "dense" / "generation_config.json").unlink(missing_ok=True)
    record(saved, tmp_path / "dense", seq_length=64)
    export(saved, tmp_path / "hf")
    dense, moe = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("dense", "hf"))
    for name in TOKENS:
        assert getattr(moe.config, name) == getattr(dense.config, name)
        assert getattr(moe.generation_config, name) == getattr(dense.generation_config, name)


@pytest.fixture(scope="module")
def run(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Any]:
    """The last checkpoint of a run, and what its ranks ended with."""
    workspace = make_workspace(tmp_path_factory.mktemp("workspace"))
    dense = workspace / "dense_hf"
    (dense / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (dense / "additional_chat_templates").mkdir()
    (dense / "additional_chat_templates" / "tools.jinja").write_text(TOOLS_TEMPLATE)
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | TOKENS))
    (dense / "generation_config.json").write_text(json.dumps(GENERATION))
    results = ranks.run(
        train,
        2,
        directory=workspace,
        options={
            "name": "run",
            "max_steps": 2,
            "expert_model_parallel_size": 2,
            "seq_length": 64,
        },
        overrides={"trainer.limit_val_batches": 0},
    )
    return list((workspace / "run" / "checkpoints").glob("*-last")), results

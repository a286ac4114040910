"""A larger MoE from a trained one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from nemo_upcycle import Growth, grow_directory
from nemo_upcycle.cli import app
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.trained.growth import plan_growth
from nemo_upcycle.trained.opened import open_as_stored
from tests.moe_models import MOES, write_moe
from tests.tiny import tokens, write_dense, write_llama

IDS = tokens(2, 40)
WEIGHTS = "model.safetensors"


def logits(directory: Path) -> torch.Tensor:
    model, loading = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    with torch.no_grad():
        return model.eval()(IDS).logits


def distance(one: Path, other: Path) -> float:
    return (logits(one) - logits(other)).abs().max().item()


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    return write_moe(tmp_path / "moe", "mixtral")


@pytest.mark.parametrize("experts", [8, 12])
@pytest.mark.parametrize("kind", MOES)
def test_the_larger_model_computes_the_source(tmp_path: Path, kind: str, experts: int) -> None:
    source = write_moe(tmp_path / "moe", kind)
    plan = grow_directory(source, tmp_path / "large", Growth(experts))
    assert plan.exactness.exact and plan.model.num_experts == experts
    assert distance(tmp_path / "large", source) <= 1e-5
    assert open_as_stored(tmp_path / "large").model == plan.model
    stored = load_file(tmp_path / "large" / WEIGHTS)
    assert sum(value.numel() for value in stored.values()) == plan.parameters


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe, softmax first", "glm4_moe, one expert"])
def test_another_topk_is_said_not_to_be_exact_and_is_not(tmp_path: Path, kind: str) -> None:
    source = write_moe(tmp_path / "moe", kind)
    kept = plan_growth(source, Growth(8)).model.topk
    for topk in {2, 4} - {kept}:
        plan = grow_directory(source, tmp_path / str(topk), Growth(8, topk, router_noise=0.0))
        assert not plan.exactness.exact and f"(topk={kept} keeps" in plan.exactness.reason
        assert distance(tmp_path / str(topk), source) > 1e-3


def test_router_rows_and_experts_are_repeated(mixtral: Path, tmp_path: Path) -> None:
    grow_directory(mixtral, tmp_path / "large", Growth(12))
    small, large = load_file(mixtral / WEIGHTS), load_file(tmp_path / "large" / WEIGHTS)
    gate = "model.layers.2.block_sparse_moe.gate.weight"
    assert torch.equal(large[gate], small[gate].repeat(3, 1))
    expert = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    for number in range(12):
        assert torch.equal(large[expert.format(number)], small[expert.format(number % 4)])


def test_noise_is_on_the_rows_of_copies_alone(mixtral: Path, tmp_path: Path) -> None:
    plan = grow_directory(mixtral, tmp_path / "two", Growth(8, 2))
    assert plan.growth.router_noise == 0.01 and "have noise of 0.01" in plan.exactness.reason
    grow_directory(mixtral, tmp_path / "again", Growth(8, 2))
    grow_directory(mixtral, tmp_path / "other", Growth(8, 2, seed=5))
    small, two, again, other = (
        load_file(directory / WEIGHTS)
        for directory in (mixtral, *(tmp_path / name for name in ("two", "again", "other")))
    )
    gates = [name for name in small if name.endswith("gate.weight")]
    differences = []
    for name, values in two.items():
        assert torch.equal(values, again[name])
        if name not in gates:
            continue
        assert torch.equal(values[:4], small[name])
        assert not torch.equal(values[4:], other[name][4:])
        differences.append((values[4:] - small[name]) / small[name].std())
    drawn = torch.stack(differences)
    assert drawn.std().item() == pytest.approx(0.01, rel=0.1)
    assert not torch.equal(drawn[0], drawn[1])


def test_another_dtype_is_rounded_once(tmp_path: Path) -> None:
    source = write_moe(tmp_path / "moe", "glm4_moe")
    plan = grow_directory(source, tmp_path / "large", dtype="BF16")
    assert "weights are rounded from F32 to BF16" in plan.notes
    small, large = load_file(source / WEIGHTS), load_file(tmp_path / "large" / WEIGHTS)
    name = "model.layers.2.mlp.gate.weight"
    assert torch.equal(large[name], small[name].bfloat16().repeat(2, 1))
    assert large["model.layers.2.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    config = json.loads((tmp_path / "large" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_files_travel_and_say_where_the_model_is_from(
    mixtral: Path, tokenizer: Path, tmp_path: Path
) -> None:
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(mixtral)
    (mixtral / "chat_template.jinja").write_text("{{ messages }}")
    (mixtral / "LICENSE").write_text("Do as you like.")
    (mixtral / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Small\n")
    config = json.loads((mixtral / "config.json").read_text()) | {"of_someone": 7}
    (mixtral / "config.json").write_text(json.dumps(config))
    grow_directory(mixtral, tmp_path / "large", Growth(16))
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "generation_config.json"):
        assert (tmp_path / "large" / name).read_bytes() == (mixtral / name).read_bytes()
    card = (tmp_path / "large" / "README.md").read_text()
    for words in ("license: apache-2.0", "grown from moe", "arXiv 2604.19835", "16 per MoE layer"):
        assert words in card
    assert str(tmp_path) not in card and "## Card of moe" in card
    record = json.loads((tmp_path / "large" / "grown_from.json").read_text())
    assert (record["source"], record["experts"]) == ("moe", 4)
    assert record["growth"] == {"experts": 16, "topk": 8, "router_noise": 0.0, "seed": 1234}
    changed = {"num_local_experts": 16, "num_experts_per_tok": 8}
    assert json.loads((tmp_path / "large" / "config.json").read_text()) == config | changed


def test_several_files_hold_the_same(tmp_path: Path) -> None:
    source = write_moe(tmp_path / "moe", "granitemoe")
    grow_directory(source, tmp_path / "one")
    grow_directory(source, tmp_path / "several", shard_bytes=300_000)
    files = sorted((tmp_path / "several").glob("*.safetensors"))
    assert len(files) > 2
    held = {name: value for file in files for name, value in load_file(file).items()}
    for name, values in load_file(tmp_path / "one" / WEIGHTS).items():
        assert torch.equal(held.pop(name), values)
    assert not held


@pytest.mark.parametrize(
    ("growth", "words"),
    [
        (Growth(6), "experts is 6, and the Mixture-of-Experts has 4; expected a multiple"),
        (Growth(4), "experts is 4"),
        (Growth(2), "experts is 2"),
        (Growth(0), "experts is 0"),
        (Growth(8, 9), "topk is 9; expected 2 to 8"),
        (Growth(8, 1), "topk is 1; expected 2 to 8 .the softmax of one value"),
        (Growth(8, router_noise=-1.0), "router_noise is -1"),
        (Growth(8, router_noise=float("nan")), "router_noise is nan"),
        (Growth(8, seed=-1), "seed is -1"),
    ],
)
def test_what_cannot_be_is_refused(
    mixtral: Path, tmp_path: Path, growth: Growth, words: str
) -> None:
    with pytest.raises(UpcyclingError, match=words):
        grow_directory(mixtral, tmp_path / "large", growth)
    assert not list(tmp_path.glob("large*"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.norm.weight": None}, r"lacks 1 tensors: model\.norm\.weight"),
        ({"model.extra.weight": torch.ones(3)}, r"unlike a MixtralForCausalLM, 1 tensors: model"),
        ({"model.norm.weight": torch.ones(3)}, "wrong shape: model.norm.weight is .3., expected"),
    ],
)
def test_a_source_that_is_not_whole_is_refused(
    mixtral: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    tensors = load_file(mixtral / WEIGHTS) | change
    tensors = {name: value for name, value in tensors.items() if value is not None}
    save_file(tensors, mixtral / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UpcyclingError, match=words):
        grow_directory(mixtral, tmp_path / "large")
    assert not list(tmp_path.glob("large*"))


def test_a_value_that_a_dtype_cannot_hold_is_refused(mixtral: Path, tmp_path: Path) -> None:
    tensors = load_file(mixtral / WEIGHTS)
    tensors["model.layers.3.block_sparse_moe.experts.1.w1.weight"][2, 3] = 7e4
    save_file(tensors, mixtral / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UpcyclingError, match="65504"):
        grow_directory(mixtral, tmp_path / "large", dtype="F16")
    assert not list(tmp_path.glob("large*"))


def run(*words: object) -> tuple[int, str]:
    ended = CliRunner().invoke(app, ["upcycle", *map(str, words)])
    return ended.exit_code, ended.output


def test_the_command_shows_what_it_writes(mixtral: Path, tmp_path: Path) -> None:
    code, shown = run(mixtral, tmp_path / "large", "--experts", "16", "--dry-run")
    assert code == 0 and not list(tmp_path.glob("large*"))
    for text in (
        "moe → MixtralForCausalLM of 16 experts",
        "16 in each of 4 of 4 layers, 8 per token; before 4 and 2",
        "exact: a token gets all 4 copies",
        "Note: the copies of an expert are equal",
    ):
        assert text in shown
    options = ["--experts", "16", "--router-noise", "0.1", "--seed", "0"]
    code, shown = run(mixtral, tmp_path / "large", *options)
    assert code == 0 and "written to" in shown and "not exact: the router's rows" in shown
    record = json.loads((tmp_path / "large" / "grown_from.json").read_text())
    assert record["growth"] == {"experts": 16, "topk": 8, "router_noise": 0.1, "seed": 0}


def test_the_command_refuses_what_is_of_dense_layers(mixtral: Path, tmp_path: Path) -> None:
    options = ["--granularity", "2", "--shared-expert", "--initializer", "copy"]
    code, shown = run(mixtral, tmp_path / "large", *options)
    assert code == 1 and "granularity, initializer, moe_shared_expert is given" in shown
    code, shown = run(write_llama(tmp_path / "dense"), tmp_path / "moe2", "--router-noise", "1")
    assert code == 1 and "--router-noise is 1 for the dense model" in shown
    code, shown = run(mixtral, mixtral / "inside", "--dry-run")
    assert code == 1 and "lies in the input" in shown


def test_a_family_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    source = write_dense(tmp_path / "moe", "llama")
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "olmoe", "num_experts": 4}
    (source / "config.json").write_text(json.dumps(config))
    code, shown = run(source, tmp_path / "large")
    assert code == 1 and "is an MoE already" in shown

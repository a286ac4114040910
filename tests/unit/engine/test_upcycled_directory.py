"""A Hugging Face directory of an MoE, straight from a dense one."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from nemo_upcycle.cli import app
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.engine.upcycled_directory import plan_directory, upcycle_directory
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.names import stored_name
from nemo_upcycle.trained.opened import open_trained
from tests.stacks import DIGESTS, EXPORT_DIGEST, digest, files_digest, write_by_numbers
from tests.tiny import FAMILIES, into_hub_cache, write_dense, write_llama

EXACT = {
    "E8T2": UpcyclingConfig(),
    "E4G2T4": UpcyclingConfig(num_moe_experts=8, granularity=2, moe_router_topk=4),
    "some layers": UpcyclingConfig(num_moe_experts=4, moe_layer_freq=2),
    "shared expert": UpcyclingConfig(num_moe_experts=4, moe_shared_expert=True),
    "part shared": UpcyclingConfig(num_moe_experts=4, moe_shared_expert_intermediate_size=0.25),
    "sigmoid": UpcyclingConfig(num_moe_experts=4, moe_router_score_function="sigmoid"),
    "sigmoid, expert bias, part shared": UpcyclingConfig(
        num_moe_experts=4,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_shared_expert_intermediate_size=0.5,
    ),
}
SHARED = {"shared expert", "part shared"}
SIGMOID = {"sigmoid", "sigmoid, expert bias, part shared"}
REFUSED = {
    "qwen3": SHARED,
    "mistral, window": SHARED | SIGMOID | {"some layers"},
    "granite": SIGMOID | {"some layers", "part shared"},
    "phi3": EXACT.keys(),
    "smollm3": EXACT.keys(),
    "gemma": EXACT.keys(),
    "stablelm": EXACT.keys(),
    "stablelm, no biases": EXACT.keys(),
}
"""What no architecture of transformers has beside a window, norms of queries and keys, multipliers,
a head rotated in part, layers without RoPE, and other norms."""

TOKENS = torch.arange(40)[None] * 5 % 250


def logits(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def megatron_parameters(directory: Path) -> dict[str, torch.Tensor]:
    """Return an MoE's whole parameters by the names that its model has in Megatron."""
    trained = open_trained(directory)
    tensors = load_file(directory / "model.safetensors")
    found = {}
    for name in (stored_name(shape) for shape in plan_of(directory)):
        parts = [tensors[tensor][start:stop] for tensor, start, stop in trained.segments(name)]
        is_norm = name.endswith(".mlp.linear_fc1.layer_norm_weight")
        of_moe = name.replace(".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm.")
        found[of_moe if is_norm else name] = torch.cat(parts)
    return found


def plan_of(directory: Path) -> list[str]:
    """Return the names of the parameters of a model like an upcycled one."""
    dense = json.loads((directory / "upcycled_from.json").read_text())["dense_checkpoint"]
    sources = [str(directory.parent / name) for name in dense.split("; ")]
    return list(plan_directory(",".join(sources)).shapes)


@pytest.mark.parametrize("way", DIGESTS)
def test_weights_are_those_of_both_fronts(tmp_path: Path, way: str) -> None:
    source, initializer = str(write_by_numbers(tmp_path / "dense")), way
    if way == "branches":
        source += f",{write_by_numbers(tmp_path / 'branch', salt=1)}"
        initializer = "copy"
    upcycle_directory(source, tmp_path / "moe", UpcyclingConfig(initializer=initializer))
    assert digest(megatron_parameters(tmp_path / "moe")) == DIGESTS[way]


def test_files_are_those_of_an_export(tmp_path: Path) -> None:
    dense = write_by_numbers(tmp_path / "dense")
    upcycle_directory(str(dense), tmp_path / "moe")
    for ours in ("README.md", "upcycled_from.json"):
        (tmp_path / "moe" / ours).unlink()
    assert files_digest(tmp_path / "moe") == EXPORT_DIGEST


@pytest.mark.parametrize("way", EXACT)
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"nemotron"}))
def test_the_moe_computes_the_dense_model(tmp_path: Path, family: str, way: str) -> None:
    dense = write_dense(tmp_path / "dense", family)
    try:
        plan, _ = upcycle_directory(str(dense), tmp_path / "moe", EXACT[way])
    except UpcyclingError as error:
        assert way in REFUSED.get(family, ())
        assert "which no Mixture-of-Experts" in str(error)
        assert not (tmp_path / "moe").exists()
        return
    assert plan.exactness.exact
    torch.testing.assert_close(logits(tmp_path / "moe"), logits(dense), atol=1e-5, rtol=0)


def test_several_files_hold_the_same(dense: Path, tmp_path: Path) -> None:
    upcycle_directory(str(dense), tmp_path / "one")
    upcycle_directory(str(dense), tmp_path / "several", shard_bytes=300_000)
    files = sorted((tmp_path / "several").glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    held: dict[str, torch.Tensor] = {}
    for file in files:
        held |= load_file(file)
    for name, values in load_file(tmp_path / "one" / "model.safetensors").items():
        assert torch.equal(held.pop(name), values)
    assert not held


def test_another_dtype_is_rounded_once(dense: Path, tmp_path: Path) -> None:
    plan, _ = upcycle_directory(str(dense), tmp_path / "moe", dtype="BF16")
    assert "weights are rounded from F32 to BF16" in " ".join(plan.notes)
    moe = load_file(tmp_path / "moe" / "model.safetensors")
    assert {values.dtype for values in moe.values()} == {torch.bfloat16}
    up = load_file(dense / "model.safetensors")["model.layers.2.mlp.up_proj.weight"]
    assert torch.equal(moe["model.layers.2.block_sparse_moe.experts.5.w3.weight"], up.bfloat16())
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_tokenizer_template_licence_and_card_come_along(tokenizer: Path, tmp_path: Path) -> None:
    dense = into_hub_cache(write_llama(tmp_path / "dense"), tmp_path / "cache", "someone/tiny")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(dense)
    (dense / "chat_template.jinja").write_text("{{ messages }}")
    (dense / "LICENSE.txt").write_text("Do as you like.")
    (dense / "README.md").write_text(
        "---\nlicense: apache-2.0\nwidget: no\n---\n# Tiny\n```\n# no heading\n```\n"
    )
    upcycle_directory(str(dense), tmp_path / "moe")
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE.txt", "generation_config.json"):
        assert (tmp_path / "moe" / name).read_bytes() == (dense / name).read_bytes()
    card = (tmp_path / "moe" / "README.md").read_text()
    assert "license: apache-2.0" in card and "- someone/tiny" in card
    assert "widget" not in card and str(tmp_path) not in card
    assert "### Tiny\n```\n# no heading" in card and "**Not trained since.**" in card


@pytest.mark.parametrize(
    ("config", "family", "words"),
    [
        ({"num_moe_experts": None}, "llama", "num_moe_experts is None"),
        ({"num_moe_experts": 10, "granularity": 5, "moe_router_topk": 5}, "llama", "granularity=5"),
        ({}, "nemotron", "squared ReLU"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, config: dict[str, Any], family: str, words: str
) -> None:
    dense = write_dense(tmp_path / "dense", family)
    with pytest.raises(UpcyclingError, match=words):
        upcycle_directory(str(dense), tmp_path / "moe", UpcyclingConfig(**config))
    assert not list(tmp_path.glob("moe*"))


def test_a_weight_that_is_not_finite_leaves_nothing(dense: Path, tmp_path: Path) -> None:
    bad = write_llama(tmp_path / "bad")
    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][5, 7] = torch.nan
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UpcyclingError, match="down_proj"):
        upcycle_directory(str(bad), tmp_path / "moe")
    assert not list(tmp_path.glob("moe*"))


def test_a_value_that_a_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    large = write_llama(tmp_path / "large")
    tensors = load_file(large / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = 7e4
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UpcyclingError, match="65504"):
        upcycle_directory(str(large), tmp_path / "moe", dtype="F16")
    assert not list(tmp_path.glob("moe*"))
    upcycle_directory(str(large), tmp_path / "moe", dtype="BF16")


def test_a_directory_that_exists_is_kept(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "moe").mkdir()
    with pytest.raises(UpcyclingError, match="exists"):
        upcycle_directory(str(dense), tmp_path / "moe")


@pytest.mark.parametrize(("name", "message"), [(".", "exists"), ("inside", "lies in the input")])
@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_the_dry_run_refuses_what_the_run_refuses(
    dense: Path, name: str, message: str, option: list[str]
) -> None:
    shown = CliRunner().invoke(app, ["upcycle", str(dense), str(dense / name), *option])
    assert shown.exit_code == 1
    assert message in shown.output
    assert not (dense / "inside").exists()


@contextmanager
def small_files() -> Iterator[None]:
    """No file of this process can grow beyond 100 kB.

    Not a fixture: pytest reports a test before the fixtures end, and pytest's log may be larger.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_error(dense: Path, tmp_path: Path) -> None:
    with small_files():
        ended = CliRunner().invoke(app, ["upcycle", str(dense), str(tmp_path / "moe")])
    assert ended.exit_code == 1
    assert "cannot be written: File too large" in ended.output
    assert len([line for line in ended.output.splitlines() if line.startswith("Error: ")]) == 1
    assert "Traceback" not in ended.output
    assert not list(tmp_path.glob("moe*"))


def test_the_command_shows_what_it_writes(dense: Path, tmp_path: Path) -> None:
    words = ["upcycle", str(dense), str(tmp_path / "moe"), "--granularity", "2", "--topk", "4"]
    shown = CliRunner().invoke(app, [*words, "--dry-run"])
    assert shown.exit_code == 0 and not list(tmp_path.glob("moe*"))
    for text in ("MixtralForCausalLM, E8G2T4", "16 in each of 4 of 4 layers", "exact: a token's"):
        assert text in shown.output
    written = CliRunner().invoke(app, words)
    assert written.exit_code == 0 and "written to" in written.output
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert (config["num_local_experts"], config["intermediate_size"]) == (16, 48)


def test_the_command_refuses_a_dtype(dense: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["upcycle", str(dense), str(tmp_path), "--dtype", "fp8"])
    assert shown.exit_code == 1 and "fp32, bf16, fp16" in shown.output

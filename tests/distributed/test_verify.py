"""`verify` says "exact" of an exact upcycling, and of another how far it is and why."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nemo_upcycle.checkpoint import open_checkpoint
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.evaluation.parity import (
    Parity,
    compare,
    length_beyond,
    other_numbers,
    reasons,
    rows_of,
)
from nemo_upcycle.evaluation.rounding import reorder
from nemo_upcycle.families import Architecture, architecture_of
from nemo_upcycle.trained.drift import drift
from nemo_upcycle.trained.export import export
from nemo_upcycle.trained.opened import open_trained
from tests.distributed import scenarios
from tests.distributed.pool import RankPool, nemo_recipe
from tests.distributed.step0 import FOLDED
from tests.thorough import thorough
from tests.tiny import LLAMA31_ROPE, tokens, write_dense
from tests.workspace import make_workspace

IDS = tokens(rows=3, length=65)
ROUTER_FIRST = {"moe_router_pre_softmax": True}
G4 = {"num_moe_experts": 16, "granularity": 4, "moe_router_topk": 4}


def upcycled(
    ranks: RankPool, directory: Path, family: str = "llama", **upcycling: Any
) -> tuple[Path, Path]:
    """Return a dense checkpoint and what it became, saved by 2 ranks."""
    dense = write_dense(directory / "dense", family)
    ranks.run(
        scenarios.upcycled_and_saved_as_nemo,
        2,
        dense=dense,
        folding=ParallelFolding(expert_model_parallel_size=2),
        upcycling=UpcyclingConfig(**upcycling),
        directory=directory / "moe",
    )
    return dense, directory / "moe"


@nemo_recipe
def parity(dense: Path, moe: Path, folding: ParallelFolding, dtype: str = "float32") -> Parity:
    """Compare as the command does."""
    from nemo_upcycle.evaluation.opening import open_model

    models = [open_model(source, folding, dtype) for source in (dense, moe)]
    return compare(models[0], models[1], IDS, batch_size=2)


def why(dense: Path, moe: Path, dense_checkpoints: int = 1) -> str:
    checkpoint, trained = open_checkpoint(str(dense)), open_trained(moe)
    arch = checkpoint.architecture
    found = drift(checkpoint, trained)
    return "; ".join(reasons(found, trained.model, arch, dense_checkpoints))


@pytest.mark.parametrize(
    "upcycling",
    [
        {},
        thorough(G4),
        thorough({"moe_shared_expert": True}),
        thorough({"moe_layer_freq": (0, 1, 1, 0)}),
    ],
    ids=["E8T2", "E4G4T4", "shared expert", "partly dense"],
)
def test_an_exact_upcycling_is_exact(
    ranks: RankPool, tmp_path: Path, upcycling: dict[str, Any]
) -> None:
    dense, moe = upcycled(ranks, tmp_path, **upcycling)
    for world_size, folding in ((1, ParallelFolding()), (4, FOLDED)):
        for found in ranks.run(parity, world_size, dense=dense, moe=moe, folding=folding):
            assert found.exact
            assert found.tokens == IDS[:, 1:].numel()
            assert found.kl < 1e-9
            assert found.top1 == 1
            assert found.moe_loss == pytest.approx(found.dense_loss, abs=1e-5)
    (rounded,) = ranks.run(
        parity, 1, dense=dense, moe=moe, folding=ParallelFolding(), dtype="bfloat16"
    )
    assert rounded.exact
    assert rounded.difference > 0
    assert drift(open_checkpoint(str(dense)), open_trained(moe)).untouched


@pytest.mark.parametrize(
    ("upcycling", "message"),
    [
        thorough(({**ROUTER_FIRST, "weight_scaling": "none"}, "by less than 1 in total")),
        ({**ROUTER_FIRST, "weight_scaling": "paper"}, "only on average"),
        thorough(({**G4, "weight_scaling": "none"}, "divided by granularity 4")),
        thorough(({**G4, "weight_scaling": "paper"}, "cube-root scaling")),
        ({**G4, "router_initializer": "random"}, "virtual_groups"),
        thorough(({**G4, "moe_router_topk": 6}, "do not make up whole copies")),
        ({"initializer": "noise"}, "from the dense layer: trained, or changed by an init"),
        thorough(
            ({"initializer": "noise(std=0.001)"}, "from the dense layer: trained, or changed by")
        ),
    ],
)
def test_another_upcycling_says_why(
    ranks: RankPool, tmp_path: Path, upcycling: dict[str, Any], message: str
) -> None:
    dense, moe = upcycled(ranks, tmp_path, **upcycling)
    (found,) = ranks.run(parity, 1, dense=dense, moe=moe, folding=ParallelFolding())
    assert not found.exact
    assert found.kl > 1e-6
    assert message in why(dense, moe)


def test_numbers_are_those_of_the_logits(ranks: RankPool, tmp_path: Path) -> None:
    """Trained weights, through Hugging Face, against the definitions."""
    dense = write_dense(tmp_path / "dense", "qwen2")
    ranks.run(
        scenarios.trained_and_saved,
        1,
        dense=dense,
        folding=ParallelFolding(),
        upcycling=UpcyclingConfig(),
        directory=tmp_path / "moe",
        ids=IDS,
    )
    export(tmp_path / "moe", tmp_path / "hf")
    (found,) = ranks.run(parity, 1, dense=dense, moe=tmp_path / "hf", folding=ParallelFolding())
    with torch.no_grad():
        one, other = (
            AutoModelForCausalLM.from_pretrained(path)(IDS[:, :-1]).logits
            for path in (dense, tmp_path / "hf")
        )
    labels = IDS[:, 1:].flatten()
    losses = [torch.nn.functional.cross_entropy(x.flatten(0, 1), labels) for x in (one, other)]
    assert (found.dense_loss, found.moe_loss) == pytest.approx([float(x) for x in losses], rel=1e-5)
    kl = torch.nn.functional.kl_div(
        other.log_softmax(-1), one.log_softmax(-1), log_target=True, reduction="none"
    )
    assert found.kl == pytest.approx(float(kl.sum(-1).mean()), rel=1e-4)
    assert found.top1 == pytest.approx(float((one.argmax(-1) == other.argmax(-1)).float().mean()))
    assert found.difference == pytest.approx(float((one - other).abs().max()), rel=1e-5)
    distances = (one - other).norm(dim=-1) / one.norm(dim=-1)
    assert found.relative == pytest.approx(float(distances.max()), rel=1e-5)
    assert "was trained on" in why(dense, tmp_path / "hf")


DEEP = {
    "30 layers": {"num_hidden_layers": 30},
    "60 layers that amplify": {"num_hidden_layers": 60, "initializer_range": 0.2},
}


@pytest.fixture(scope="module", params=DEEP)
def deep(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, Path]:
    """A deep dense model and what it became, both for transformers."""
    directory = tmp_path_factory.mktemp("deep")
    dense = write_dense(directory / "dense", "llama", **DEEP[request.param])
    ranks.run(
        scenarios.upcycled_and_saved_as_nemo,
        1,
        dense=dense,
        folding=ParallelFolding(),
        upcycling=UpcyclingConfig(num_moe_experts=4),
        directory=directory / "moe",
    )
    export(directory / "moe", directory / "hf")
    return dense, directory / "hf"


def load(path: Path, **changed: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **changed).eval()


def test_depth_is_no_difference(deep: tuple[Path, Path]) -> None:
    """More layers round more, in the dense model as in the MoE."""
    dense, moe = map(load, deep)
    found = compare(dense, moe, IDS)
    assert found.exact
    assert 0 < found.rounding < 2e-4
    assert found.relative < 3 * found.rounding
    # Reordered, the dense model is still itself.
    assert compare(load(deep[0]), dense, IDS).exact


def off_by(relative: float, ending: str = "weight") -> Callable[[PreTrainedModel], None]:
    def change(model: PreTrainedModel) -> None:
        torch.manual_seed(2)
        for name, weight in model.named_parameters():
            if name.endswith(ending):
                weight.mul_(1 + relative * torch.randn_like(weight))

    return change


def swap_gate_and_up(model: PreTrainedModel) -> None:
    expert = model.model.layers[3].block_sparse_moe.experts[1]
    expert.w1, expert.w3 = expert.w3, expert.w1


def round_one_tensor(model: PreTrainedModel) -> None:
    weight = model.model.layers[5].self_attn.q_proj.weight
    weight.copy_(weight.bfloat16())


EXPERT = "layers.7.block_sparse_moe.experts.2.w2.weight"
DIFFERENT: dict[str, tuple[dict[str, Any], Callable[[PreTrainedModel], None] | None]] = {
    "weights off by 1e-4": ({}, off_by(1e-4)),
    "one expert off by 1%": ({}, off_by(1e-2, EXPERT)),
    "gate and up of one expert swapped": ({}, swap_gate_and_up),
    "one tensor rounded to bf16": ({}, round_one_tensor),
    "RoPE base 10,100 for 10,000": ({"rope_theta": 10100.0}, None),
    "epsilon of norms": ({"rms_norm_eps": 1e-6}, None),
    "a window": ({"sliding_window": 32}, None),
}


@pytest.mark.parametrize("difference", DIFFERENT)
def test_what_differs_is_seen(deep: tuple[Path, Path], difference: str) -> None:
    """Also in a deep model, whose rounding is larger."""
    config, change = DIFFERENT[difference]
    moe = load(deep[1], **config)
    if change is not None:
        with torch.no_grad():
            change(moe)
    found = compare(load(deep[0]), moe, IDS)
    assert not found.exact, found


def test_half_precision_is_not_taken_for_equal(ranks: RankPool, tmp_path: Path) -> None:
    """However much a model rounds in bf16, half of the digits must agree."""
    dense, moe = upcycled(ranks, tmp_path, **ROUTER_FIRST, weight_scaling="none")
    (found,) = ranks.run(
        parity, 1, dense=dense, moe=moe, folding=ParallelFolding(), dtype="bfloat16"
    )
    assert not found.exact
    assert found.tolerance <= 0.1


@pytest.mark.parametrize("family", ["llama", "qwen2, tied", "qwen3", "nemotron", "mistral, window"])
def test_a_reordered_model_computes_the_same(ranks: RankPool, tmp_path: Path, family: str) -> None:
    """In transformers and in Megatron, under any mapping."""
    dense = write_dense(tmp_path / "dense", family)
    for world_size, folding in ((1, ParallelFolding()), (4, FOLDED)):
        for distance in ranks.run(reordered, world_size, dense=dense, folding=folding):
            assert 0 < distance < 1e-5


@nemo_recipe
def reordered(dense: Path, folding: ParallelFolding) -> float:
    from nemo_upcycle.evaluation.opening import open_model

    model = open_model(dense, folding, "float32")
    before = model(IDS).logits
    reorder(model, model.config.hidden_size)
    return float(((model(IDS).logits - before).norm(dim=-1) / before.norm(dim=-1)).max())


def test_what_no_weight_shows_is_a_reason(deep: tuple[Path, Path], tmp_path: Path) -> None:
    moe = shutil.copytree(deep[1], tmp_path / "moe")
    config = json.loads((moe / "config.json").read_text())
    (moe / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    found = open_checkpoint(str(deep[0])).config
    said = list(other_numbers(open_trained(moe).model.arch, architecture_of(found)))
    assert said == ["its rotary_base is 500000.0, the dense model's 10000.0"]


@pytest.mark.parametrize(
    ("scaling", "message"),
    [("none", "divided by granularity 4"), ("paper", "virtual_groups")],
)
def test_squared_relu_is_not_blamed_for_a_gate(
    ranks: RankPool, tmp_path: Path, scaling: str, message: str
) -> None:
    """The papers' cube root is exact for a neuron without a gate."""
    dense, moe = upcycled(ranks, tmp_path, "nemotron", **G4, weight_scaling=scaling)
    said = why(dense, moe)
    assert message in said
    assert "SwiGLU" not in said
    assert "experts come from 2 dense models" in why(dense, moe, dense_checkpoints=2)


def test_rows_reach_beyond_a_window(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_workspace(tmp_path) / "tokenizer")
    mistral = mistral_of(tmp_path, sliding_window=1024)
    assert length_beyond(100, mistral) == 1536
    text = "def main(): pass\n" * 5000
    assert rows_of(text, tokenizer, 4096, 32768, 1536).shape == (2, 1537)
    # A window has to be left behind, whatever number of tokens is enough otherwise.
    assert rows_of(text, tokenizer, 100, 32768, 1536).shape == (1, 1537)
    assert rows_of(text, tokenizer, 4096, 1200, 1536).shape == (3, 1201)
    # A short text is one row.
    rows, length = rows_of(text[:2000], tokenizer, 4096, 32768, 1536).shape
    assert rows == 1
    assert 513 < length < 1537
    scaled = replace(mistral, sliding_window=None, rope_scaling=LLAMA31_ROPE)
    assert length_beyond(4096, scaled) == 48
    assert length_beyond(40, scaled) == 0
    # A window of either model counts.
    assert length_beyond(100, replace(mistral, sliding_window=None), mistral) == 1536


def mistral_of(directory: Path, **config: Any) -> Architecture:
    path = write_dense(directory / "mistral", "mistral", **config)
    found = open_checkpoint(str(path)).config
    return architecture_of(found)


def test_models_of_other_shapes_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    _, moe = upcycled(ranks, tmp_path)
    other = write_dense(tmp_path / "other", "llama", num_hidden_layers=2)
    with pytest.raises(UpcyclingError, match="num_layers 2 and 4"):
        why(other, moe)


def test_rows_need_enough_text(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_workspace(tmp_path) / "tokenizer")
    rows = rows_of("def main(): pass\n" * 500, tokenizer, 1000, 128)
    assert rows.shape == (7, 129)
    assert torch.equal(rows[1:, 0], rows[:-1, -1])  # a row's last label is the next one's input
    with pytest.raises(UpcyclingError, match="expected more than 128"):
        rows_of("short", tokenizer, 1000, 128)


def test_json_is_whole(ranks: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from nemo_upcycle.cli.evaluation import _show_parity

    dense, moe = upcycled(ranks, tmp_path)
    (found,) = ranks.run(parity, 1, dense=dense, moe=moe, folding=ParallelFolding())
    _show_parity(found, [], "title", as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert said["exact"] is True
    assert said["tokens"] == IDS[:, 1:].numel()


def test_other_numbers_are_never_exact(capsys: pytest.CaptureFixture) -> None:
    """A window beyond the text, say, does not show in the logits."""
    from nemo_upcycle.cli.evaluation import _show_parity

    same = Parity(10, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1e-5)
    why = ["its sliding_window is 600, the dense model's None"]
    _show_parity(same, why, "title", as_json=False)
    said = capsys.readouterr().out
    assert "  not exact: its sliding_window is 600, the dense model's None (which does not" in said
    _show_parity(same, why, "title", as_json=True)
    assert json.loads(capsys.readouterr().out)["exact"] is False

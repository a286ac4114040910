"""`verify` says "exact" of an exact upcycling, and of another how far it is and why."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_upcycle.checkpoint import open_checkpoint
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.evaluation.drift import drift
from nemo_upcycle.evaluation.parity import Parity, compare, reasons, rows_of
from nemo_upcycle.export import export
from nemo_upcycle.mapping import family_of
from nemo_upcycle.trained import open_trained
from tests.distributed import scenarios
from tests.distributed.pool import RankPool, nemo_recipe
from tests.distributed.test_step0 import FOLDED
from tests.tiny import tokens, write_dense

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


def why(dense: Path, moe: Path) -> str:
    checkpoint, trained = open_checkpoint(str(dense)), open_trained(moe)
    width = family_of(checkpoint.config).architecture(checkpoint.config).ffn_hidden_size
    return "; ".join(reasons(drift(checkpoint, trained), trained.model, width))


@pytest.mark.parametrize(
    "upcycling",
    [{}, G4, {"moe_shared_expert": True}, {"moe_layer_freq": (0, 1, 1, 0)}],
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
        ({**ROUTER_FIRST, "weight_scaling": "none"}, "by less than 1 in total"),
        ({**ROUTER_FIRST, "weight_scaling": "paper"}, "only on average"),
        ({**G4, "weight_scaling": "none"}, "divided by granularity 4"),
        ({**G4, "weight_scaling": "paper"}, "cube-root scaling"),
        ({**G4, "router_initializer": "random"}, "virtual_groups"),
        ({**G4, "moe_router_topk": 6}, "do not make up whole copies"),
        ({"initializer": "noise"}, "from the dense layer: trained, or changed by an init"),
        ({"initializer": "noise(std=0.001)"}, "from the dense layer: trained, or changed by"),
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


def test_models_of_other_shapes_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    _, moe = upcycled(ranks, tmp_path)
    other = write_dense(tmp_path / "other", "llama", num_hidden_layers=2)
    with pytest.raises(UpcyclingError, match="num_layers 2 and 4"):
        why(other, moe)


def test_rows_need_enough_text(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tests.workspace import make_workspace

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

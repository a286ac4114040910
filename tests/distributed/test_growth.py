"""A larger MoE computes the trained one in transformers 5 too, and a run begins with it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_upcycle import Growth, UpcyclingConfig, grow_directory, upcycle_directory
from tests.distributed import transformers5
from tests.distributed.pool import RankPool
from tests.distributed.step0 import IDS, TOLERANCE, dense_logits, opened_logits
from tests.distributed.trained import WEIGHTS, import_ckpt
from tests.distributed.training import EP2, FOLDED, WITHOUT_LEARNING, train
from tests.distributed.whole import whole
from tests.moe_models import MOES, write_moe
from tests.thorough import thorough
from tests.workspace import make_workspace


@pytest.mark.thorough
def test_transformers_5_computes_the_source(transformers_5: Path, tmp_path: Path) -> None:
    pairs = {}
    for number, kind in enumerate(MOES):
        source, large = tmp_path / f"{number}", tmp_path / f"{number}-large"
        grow_directory(write_moe(source, kind), large, Growth(8))
        pairs[str(source)] = str(large)
    torch.save(IDS, tmp_path / "ids")
    directories = json.dumps([*pairs, *pairs.values()])
    files = [str(tmp_path / name) for name in ("ids", "logits")]
    transformers5.end(
        transformers5.start(transformers_5, transformers5.LOGITS, directories, *files)
    )
    logits = torch.load(tmp_path / "logits")
    for source, large in pairs.items():
        assert (logits[source] - logits[large]).abs().max() <= TOLERANCE


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an upcycled model, a larger one of it, and that imported."""
    workspace = make_workspace(tmp_path_factory.mktemp("workspace"))
    upcycle_directory(str(workspace / "dense_hf"), workspace / "moe", UpcyclingConfig())
    grow_directory(workspace / "moe", workspace / "large", Growth(16))
    return workspace


@pytest.fixture(scope="module")
def imported(ranks: RankPool, workspace: Path) -> Path:
    ranks.run(import_ckpt, 1, source=workspace / "large", output=workspace / "nemo")
    return workspace / "nemo"


def test_the_import_computes_the_larger_model(
    ranks: RankPool, workspace: Path, imported: Path
) -> None:
    (found,) = ranks.run(opened_logits, 1, source=imported, ids=IDS)
    assert (found - dense_logits(workspace / "large", IDS)).abs().max() <= TOLERANCE


def begin(
    ranks: RankPool, workspace: Path, name: str, world_size: int, imported: Path, **options: Any
) -> list[Any]:
    """Train a step without learning, and one more, from what was imported."""
    larger = {"dense_checkpoint": str(workspace / "large"), "from_scratch": True}
    larger |= {"num_moe_experts": 16, "moe_router_topk": 4}
    results = ranks.run(
        train,
        world_size,
        directory=workspace,
        options={"name": name, "max_steps": 2, **larger, **options},
        overrides=WITHOUT_LEARNING | {"resume.restore_config": str(imported)},
    )
    assert not [result for result in results if isinstance(result, str)], results
    return results


@pytest.mark.parametrize(
    ("world_size", "folding"), [thorough((2, EP2)), (4, FOLDED)], ids=["EP2", "TP2-PP2-EP2"]
)
def test_a_recipe_trains_the_imported_weights(
    ranks: RankPool, workspace: Path, imported: Path, world_size: int, folding: dict[str, int]
) -> None:
    """In bf16 with fp32 main parameters, which a step would put in their place."""
    options = {"precision": "bf16-mixed", **folding}
    results = begin(ranks, workspace, f"large-{world_size}", world_size, imported, **options)
    parameters = whole([(s, v.float()) for _, shards in results for s, v in shards])
    stored = load_file(workspace / "large" / WEIGHTS)
    for expert in range(16):
        found = parameters[f"decoder.layers.3.mlp.experts.{expert}.linear_fc2.weight"]
        expected = stored[f"model.layers.3.block_sparse_moe.experts.{expert}.w2.weight"]
        assert torch.equal(found, expected.bfloat16().float())


@pytest.mark.thorough
def test_it_begins_with_the_loss_of_what_it_was_grown_from(
    ranks: RankPool, workspace: Path, imported: Path
) -> None:
    """The same function on the same tokens: the dense model's, by way of 8 experts and of 16."""
    ((losses, _),) = begin(ranks, workspace, "larger", 1, imported)
    ((expected, _),) = ranks.run(
        train,
        1,
        directory=workspace,
        options={"name": "upcycled", "max_steps": 2},
        overrides=WITHOUT_LEARNING,
    )
    assert losses == pytest.approx(expected, rel=1e-6)

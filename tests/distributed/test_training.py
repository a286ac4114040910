"""Whole recipes through NeMo and Lightning, on several ranks."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_upcycle.data.preparation import Preparation, prepare
from tests.distributed.pool import RankPool, nemo_recipe
from tests.distributed.training import EP2, FOLDED, WITHOUT_LEARNING, train
from tests.distributed.whole import whole
from tests.third_party import install_flip
from tests.thorough import thorough
from tests.tiny import write_llama
from tests.workspace import VOCAB_SIZE, make_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.mark.parametrize(
    ("world_size", "folding"),
    [(1, {}), thorough((2, EP2)), (4, FOLDED), thorough((4, FOLDED | {"read_once": True}))],
    ids=["1", "EP2", "TP2-PP2-EP2", "TP2-PP2-EP2-read-once"],
)
def test_optimizer_trains_on_from_the_upcycled_weights(
    ranks: RankPool, workspace: Path, world_size: int, folding: dict[str, Any]
) -> None:
    """A step with learning rate 0 leaves the weights alone, in bf16 with fp32 main parameters.

    Had the optimizer kept the main parameters of the random initialization, the step would have
    put those in their place.
    """
    results = ranks.run(
        train,
        world_size,
        directory=workspace,
        options={
            "name": "lr0-" + "-".join(map(str, [world_size, *folding.values()])),
            "max_steps": 1,
            "precision": "bf16-mixed",
            **folding,
        },
        overrides=WITHOUT_LEARNING,
    )
    errors = [result for result in results if isinstance(result, str)]
    assert not errors
    parameters = whole([(s, v.float()) for _, shards in results for s, v in shards])
    dense = load_file(workspace / "dense_hf" / "model.safetensors")
    expected = dense["model.layers.3.mlp.down_proj.weight"].bfloat16().float()
    for expert in range(8):
        name = f"decoder.layers.3.mlp.experts.{expert}.linear_fc2.weight"
        assert torch.equal(parameters[name], expected)
    assert torch.equal(
        parameters["embedding.word_embeddings.weight"],
        dense["model.embed_tokens.weight"].bfloat16().float(),
    )


def test_the_dense_control_sees_the_same_tokens_in_the_same_order(
    ranks: RankPool, workspace: Path
) -> None:
    """With learning rate 0 both compute the dense model: equal losses, batch by batch."""
    losses = {}
    for factory in ("upcycled_recipe", "dense_recipe"):
        options: dict[str, Any] = {"name": f"same-{factory}", "max_steps": 4}
        options["dense_checkpoint"] = str(workspace / "dense_hf")
        ((losses[factory], _),) = ranks.run(
            train,
            1,
            directory=workspace,
            options=options,
            overrides=WITHOUT_LEARNING,
            factory=factory,
        )
    assert losses["upcycled_recipe"] == pytest.approx(losses["dense_recipe"], rel=1e-6)
    assert len(set(losses["dense_recipe"])) == 4


def test_the_scratch_control_starts_elsewhere(ranks: RankPool, workspace: Path) -> None:
    ((losses, _),) = ranks.run(
        train,
        1,
        directory=workspace,
        options={"name": "scratch", "max_steps": 1, "from_scratch": True},
        overrides=WITHOUT_LEARNING,
    )
    assert losses[0] == pytest.approx(math.log(VOCAB_SIZE), abs=1.0)


@nemo_recipe
def train_with_package(package: Path, **kwargs: Any) -> Any:
    """Run the recipe where another package is installed."""
    import sys

    sys.path.insert(0, str(package))
    try:
        return train(**kwargs)
    finally:
        sys.path.remove(str(package))


def test_a_recipe_takes_another_packages_initializer(
    ranks: RankPool, workspace: Path, tmp_path: Path
) -> None:
    results = ranks.run(
        train_with_package,
        2,
        package=install_flip(tmp_path),
        directory=workspace,
        options={"name": "flip", "max_steps": 1, "initializer": "flip(fraction=0.25)", **EP2},
        overrides=WITHOUT_LEARNING,
    )
    assert not [result for result in results if isinstance(result, str)]
    parameters = whole([shard for _, shards in results for shard in shards])
    dense = load_file(workspace / "dense_hf" / "model.safetensors")
    expected = dense["model.layers.3.mlp.down_proj.weight"]
    for expert in range(8):
        found = parameters[f"decoder.layers.3.mlp.experts.{expert}.linear_fc2.weight"]
        flipped = (found == -expected).all(dim=0)
        assert int(flipped.sum()) == expected.shape[1] // 4
        assert torch.equal(found[:, ~flipped], expected[:, ~flipped])


def _copy(workspace: Path, target: Path) -> Path:
    return Path(shutil.copytree(workspace / "dense_hf", target))


def _drop_tensor(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})


def _wrong_shape(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})


def _truncate(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _not_finite(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.3.mlp.gate_proj.weight"][5, 7] = float("nan")
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})


def _pickled(checkpoint: Path) -> None:
    torch.save({}, checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()


def _wrong_config(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"intermediate_size": 80}))


FAULTS = {
    "lacks a tensor": (_drop_tensor, "1 missing: model.layers.2.mlp.up_proj.weight"),
    "wrong shape": (_wrong_shape, "model.layers.1.self_attn.k_proj.weight is [31, 64], expected"),
    "truncated": (_truncate, "cannot be read as safetensors"),
    "not finite": (_not_finite, "model.layers.3.mlp.gate_proj.weight"),
    "pickled": (_pickled, "pickled weights"),
    "config contradicts weights": (_wrong_config, "expected [80, 64]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_checkpoint_is_one_error_on_every_rank(
    ranks: RankPool, workspace: Path, tmp_path: Path, fault: str
) -> None:
    damage, message = FAULTS[fault]
    dense = _copy(workspace, tmp_path / "dense")
    damage(dense)
    results = ranks.run(
        train,
        2,
        directory=workspace,
        options={
            "name": tmp_path.name,
            "max_steps": 1,
            "dense_checkpoint": str(dense),
            **EP2,
        },
        overrides={"log.ckpt": None},
    )
    assert len(set(results)) == 1
    assert results[0].startswith("UpcyclingError: ")
    assert message in results[0]


def test_missing_checkpoint_is_an_error_on_every_rank(ranks: RankPool, workspace: Path) -> None:
    results = ranks.run(
        train,
        2,
        directory=workspace,
        options={"name": "missing", "max_steps": 1, "dense_checkpoint": "/no/such/directory"},
    )
    assert all("No dense checkpoint at '/no/such/directory'" in result for result in results)


def test_a_fault_on_one_rank_stops_all(ranks: RankPool, workspace: Path, tmp_path: Path) -> None:
    """A disk that only one node cannot read must not leave the others waiting."""
    good, bad = workspace / "dense_hf", _copy(workspace, tmp_path / "dense")
    _truncate(bad)
    results = ranks.run(
        train,
        2,
        directory=workspace,
        options={"name": "one-rank", "max_steps": 1, **EP2},
        overrides={"log.ckpt": None},
        dense_by_rank=[str(good), str(bad)],
    )
    assert len(set(results)) == 1
    assert "rank 1: " in results[0]
    assert "cannot be read as safetensors" in results[0]


def test_a_model_smaller_than_the_checkpoint_is_an_error(ranks: RankPool, workspace: Path) -> None:
    results = ranks.run(
        train,
        2,
        directory=workspace,
        options={"name": "smaller", "max_steps": 1, **EP2},
        overrides={"model.config.num_layers": 2, "log.ckpt": None},
    )
    assert len(set(results)) == 1
    assert "The model is not the dense checkpoint's: num_layers is 2, expected 4" in results[0]


def test_a_corpus_too_small_to_split_is_an_error(
    ranks: RankPool, workspace: Path, tmp_path: Path
) -> None:
    """Megatron itself loops for ever over a split without documents."""
    corpus = tmp_path / "small.jsonl"
    corpus.write_text(json.dumps({"text": "a few words"}) + "\n")
    prepare(Preparation((str(corpus),), workspace / "tokenizer", tmp_path / "small"))
    (result,) = ranks.run(
        train,
        1,
        directory=workspace,
        options={"name": "small", "max_steps": 1, "data_paths": str(tmp_path / "small")},
    )
    assert "has 1 documents, which leaves none for the valid split of 970,20,10" in result


def test_a_checkpoint_without_tokenizer_is_an_error(
    ranks: RankPool, workspace: Path, tmp_path: Path
) -> None:
    dense = write_llama(tmp_path, vocab_size=VOCAB_SIZE)
    (result,) = ranks.run(
        train,
        1,
        directory=workspace,
        options={"name": "none", "max_steps": 1, "dense_checkpoint": str(dense)},
    )
    assert "holds no tokenizer" in result


MAPPINGS = {
    "ranks do not divide": ({"tensor_model_parallel_size": 4}, {}, "2 ranks do not divide by"),
    "no sequence parallelism": (
        {},
        {"trainer.strategy.tensor_model_parallel_size": 2},
        "set trainer.strategy.sequence_parallel=True",
    ),
}


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_bad_mapping_is_refused(ranks: RankPool, workspace: Path, mapping: str) -> None:
    options, overrides, message = MAPPINGS[mapping]
    results = ranks.run(
        train,
        2,
        directory=workspace,
        options={"name": "mapping", "max_steps": 1, **options},
        overrides=overrides,
    )
    for result in results:
        assert result.startswith("UpcyclingError: ")
        assert message in result

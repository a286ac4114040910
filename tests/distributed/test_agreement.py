"""A run trains the model that its checkpoint's config describes, or stops before a weight."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from tests.distributed.pool import RankPool, nemo_recipe
from tests.distributed.training import WITHOUT_LEARNING, train
from tests.tiny import into_hub_cache
from tests.workspace import make_workspace

NAME = "some-org/some-model"


@nemo_recipe
def train_at(home: Path, cache: Path, **kwargs: Any) -> Any:
    """Run a recipe where a home directory and a hub cache are others."""
    import os

    from huggingface_hub import constants

    before = os.environ.get("HOME", "/"), constants.HF_HUB_CACHE
    os.environ["HOME"], constants.HF_HUB_CACHE = str(home), str(cache)
    try:
        return train(**kwargs)
    finally:
        os.environ["HOME"], constants.HF_HUB_CACHE = before


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def with_rope(workspace: Path, directory: Path, base: float) -> Path:
    """Copy the dense checkpoint with another RoPE base in its config; its shapes are the same."""
    shutil.copytree(workspace / "dense_hf", directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rope_theta": base}))
    return directory


@pytest.mark.thorough
def test_a_checkpoint_trains_the_same_by_any_name(
    ranks: RankPool, workspace: Path, tmp_path: Path
) -> None:
    """The step-0 loss is that of the checkpoint's RoPE base, which is not the recipe's."""
    dense = with_rope(workspace, tmp_path / "dense", 10.0)
    into_hub_cache(dense, tmp_path / "hub", NAME)
    losses = {}
    for run, (factory, source) in {
        "recipes-base": ("upcycled_recipe", str(workspace / "dense_hf")),
        "path": ("upcycled_recipe", str(dense)),
        "hub": ("upcycled_recipe", NAME),
        "home": ("upcycled_recipe", "~/dense"),
        "dense-hub": ("dense_recipe", NAME),
    }.items():
        ((losses[run], _),) = ranks.run(
            train_at,
            1,
            home=tmp_path,
            cache=tmp_path / "hub",
            directory=workspace,
            options={"name": run, "max_steps": 1, "dense_checkpoint": source},
            overrides=WITHOUT_LEARNING,
            factory=factory,
        )
    expected = losses.pop("path")
    assert losses.pop("recipes-base")[0] != pytest.approx(expected[0], rel=1e-5)
    for found in losses.values():
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("factory", ["upcycled_recipe", "dense_recipe"])
def test_another_model_is_one_error_on_every_rank(
    ranks: RankPool, workspace: Path, tmp_path: Path, factory: str
) -> None:
    results = ranks.run(
        train,
        2,
        directory=workspace,
        options={
            "name": tmp_path.name,
            "max_steps": 1,
            "dense_checkpoint": str(workspace / "dense_hf"),
        },
        overrides={"model.config.rotary_base": 5e5, "model.config.layernorm_epsilon": 1e-6},
        factory=factory,
    )
    assert len(set(results)) == 1
    assert results[0].startswith("UpcyclingError: The model is not the dense checkpoint's")
    assert "rotary_base is 500000.0, expected 10000.0" in results[0]
    assert "layernorm_epsilon is 1e-06, expected 1e-05" in results[0]


@pytest.mark.filterwarnings("ignore:/only/on/nodes")
def test_a_checkpoint_that_only_the_ranks_see_is_compared(
    ranks: RankPool, workspace: Path, tmp_path: Path
) -> None:
    """The recipe was made without the checkpoint; the ranks find another model."""
    results = ranks.run(
        train,
        2,
        directory=workspace,
        options={
            "name": tmp_path.name,
            "max_steps": 1,
            "dense_checkpoint": "/only/on/nodes",
            "tokenizer": str(workspace / "tokenizer"),
        },
        dense_by_rank=[str(workspace / "dense_hf")] * 2,
    )
    assert len(set(results)) == 1
    for words in ("hidden_size is 128, expected 64", "vocab_size is 2048, expected 512"):
        assert words in results[0]


def fill_a_smaller_model(dense: Path) -> str:
    """Fill two layers from a checkpoint of four; return the error."""
    from nemo_upcycle.checkpoint import open_checkpoint
    from nemo_upcycle.engine import load
    from tests.distributed import scenarios

    checkpoint, upcycling = open_checkpoint(str(dense)), UpcyclingConfig(num_moe_experts=None)
    arch = checkpoint.architecture
    chunks = scenarios.build_from(replace(arch, num_layers=2), ParallelFolding(), upcycling)
    report = load.fill(chunks, checkpoint, upcycling)
    with pytest.raises(UpcyclingError) as error:
        load.check_all_used(checkpoint, [report])
    return str(error.value)


def test_a_model_that_leaves_tensors_over_is_an_error(ranks: RankPool, dense: Path) -> None:
    (found,) = ranks.run(fill_a_smaller_model, 1, dense=dense)
    assert "The model has no place for 18 tensors" in found
    assert "model.layers.2.input_layernorm.weight" in found

"""Upcycling from dense NeMo 2 and Megatron-LM checkpoints, saved under any mapping."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_upcycle.checkpoint import DenseCheckpoint, MegatronCheckpoint, open_checkpoint
from nemo_upcycle.checkpoint.described import open_dense
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.families import architecture_of
from nemo_upcycle.families.llama import LLAMA
from nemo_upcycle.nemo.tokenizer import checkpoint_tokenizer
from tests.distributed.foldings import Spread, spread
from tests.distributed.megatron_dense import save_dense, upcycled_from
from tests.distributed.pool import RankPool, nemo_recipe
from tests.distributed.trained import import_ckpt
from tests.distributed.training import train
from tests.distributed.whole import differing, whole
from tests.thorough import thorough_but
from tests.tiny import FAMILIES, write_dense
from tests.workspace import make_workspace

SAVED = {
    "1 rank": (spread(1), {}),
    "TP2": (spread(2, tp=2), {}),
    "TP2, a tensor a layer": (spread(2, tp=2), {"hetereogenous_dist_checkpoint": True}),
    "PP2-VPP2": (spread(2, pp=2, vpp=2), {}),
    "TP2-PP2": (spread(4, tp=2, pp=2), {}),
}
UPCYCLED = {
    "1 rank": spread(1),
    "TP2-EP2-ETP1": spread(2, tp=2, ep=2),
    "PP2-TP2-EP2-ETP1": spread(4, pp=2, tp=2, ep=2),
}


@pytest.fixture(scope="module", params=SAVED)
def saved(
    request: pytest.FixtureRequest,
    ranks: RankPool,
    dense: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A Megatron-LM checkpoint of the dense model."""
    mapping, overrides = SAVED[request.param]
    directory = tmp_path_factory.mktemp("megatron")
    ranks.run(
        save_dense,
        mapping.world_size,
        dense=dense,
        folding=mapping.folding,
        directory=directory,
        **overrides,
    )
    return directory


def read(
    checkpoint: DenseCheckpoint, name: str, rows: slice, columns: slice | None = None
) -> torch.Tensor:
    """Read a block of an F32 tensor."""
    info = checkpoint.tensors[name]
    assert info.dtype == "F32"
    shape = [rows.stop - rows.start]
    if columns is not None:
        shape.append(columns.stop - columns.start)
    elif len(info.shape) > 1:
        shape.append(info.width)
    values = torch.full(shape, float("nan"))
    span = None if columns is None else (columns.start, columns.stop)
    buffer = memoryview(values.view(-1).view(torch.uint8).numpy())
    checkpoint.read_into(buffer, name, (rows.start, rows.stop), span)
    return values


def megatron_tensors(dense: Path) -> dict[str, torch.Tensor]:
    """Return the dense model's parameters under Megatron's names, put together by the mapping."""
    tensors = load_file(dense / "model.safetensors")
    arch = LLAMA.architecture(json.loads((dense / "config.json").read_text()))
    result = {}
    for name, operation in LLAMA.parameters.items():
        for layer in range(arch.num_layers if "{layer}" in name else 1):
            parts = [
                tensors[rows.tensor.format(layer=layer)][rows.start : rows.stop]
                for rows in operation.rows(arch)
            ]
            result[name.format(layer=layer)] = torch.cat(parts)
    return result


def test_tensors_are_the_dense_models_bit_for_bit(saved: Path, dense: Path) -> None:
    expected = megatron_tensors(dense)
    checkpoint = MegatronCheckpoint(saved)
    assert checkpoint.tensors.keys() == expected.keys()
    draw = random.Random(0)
    for name, values in expected.items():
        assert torch.equal(read(checkpoint, name, slice(0, len(values))), values), name
        for _ in range(8):
            place = [slice(*sorted(draw.sample(range(size + 1), 2))) for size in values.shape]
            assert torch.equal(read(checkpoint, name, *place), values[tuple(place)]), (name, place)


def test_architecture_is_the_dense_models(saved: Path, dense: Path) -> None:
    config = open_checkpoint(str(saved)).config
    found = architecture_of(config)
    assert found == LLAMA.architecture(json.loads((dense / "config.json").read_text()))


@pytest.fixture(scope="module")
def from_hugging_face(ranks: RankPool, dense: Path) -> dict[str, torch.Tensor]:
    return upcycled(ranks, dense, UPCYCLED["1 rank"])


@pytest.mark.parametrize("mapping", UPCYCLED)
def test_upcycled_weights_are_those_from_hugging_face(
    ranks: RankPool, saved: Path, from_hugging_face: dict[str, torch.Tensor], mapping: str
) -> None:
    assert not differing(upcycled(ranks, saved, UPCYCLED[mapping]), from_hugging_face)


def test_an_imported_checkpoint_upcycles_to_the_same_weights(
    ranks: RankPool, dense: Path, from_hugging_face: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    ranks.run(import_ckpt, 1, source=dense, output=tmp_path / "nemo")
    mapping = UPCYCLED["TP2-EP2-ETP1"]
    assert not differing(upcycled(ranks, tmp_path / "nemo", mapping), from_hugging_face)


@pytest.mark.parametrize(
    "family",
    thorough_but([name for name in FAMILIES if name != "llama"], "gemma", "nemotron"),
)
def test_nemo_checkpoints_of_every_family_are_sources(
    ranks: RankPool, tmp_path: Path, family: str
) -> None:
    """Megatron-LM's and Megatron-Bridge's are in tests/megatron/test_dense_sources.py."""
    dense, nemo = write_dense(tmp_path / "dense", family), tmp_path / "nemo"
    ranks.run(import_ckpt, 1, source=dense, output=nemo)
    assert open_dense(str(nemo)).arch == open_checkpoint(str(dense)).architecture
    found, expected = (upcycled(ranks, each, UPCYCLED["TP2-EP2-ETP1"]) for each in (nemo, dense))
    assert not differing(found, expected)


def upcycled(ranks: RankPool, source: Path, mapping: Spread) -> dict[str, torch.Tensor]:
    results = ranks.run(
        upcycled_from,
        mapping.world_size,
        source=source,
        folding=mapping.folding,
        upcycling=UpcyclingConfig(),
    )
    return whole(shard for shards in results for shard in shards)


@nemo_recipe
def train_dense(directory: Path, options: dict[str, Any]) -> None:
    """Train the tiny dense recipe, which saves NeMo 2's own checkpoint."""
    import fiddle
    from nemo_upcycle_recipes import llama_tiny

    recipe = llama_tiny.dense_recipe(dir=str(directory), **options)
    recipe.trainer.limit_val_batches = 0
    fiddle.build(recipe)()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def nemo_dense(ranks: RankPool, workspace: Path) -> Path:
    """A dense checkpoint that NeMo 2 has trained and saved on two ranks."""
    options = {"name": "dense", "max_steps": 1, "tensor_model_parallel_size": 2}
    ranks.run(train_dense, 2, directory=workspace, options=options)
    (checkpoint,) = (workspace / "dense" / "checkpoints").glob("*-last")
    return checkpoint


def torch_reads(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint with torch's own reader, one tensor a layer."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(checkpoint / "weights")
    entries = reader.read_metadata().state_dict_metadata
    names = [name for name in entries if name.startswith("module.") and "extra" not in name]
    state = {name: torch.empty(entries[name].size) for name in names}
    dcp.load(state, storage_reader=reader, no_dist=True)
    result = {}
    for name, values in state.items():
        name = name.removeprefix("module.")
        if not name.startswith("decoder.layers."):
            result[name] = values
            continue
        for layer, part in enumerate(values):
            result[re.sub(r"(?<=\.layers)", f".{layer}", name, count=1)] = part
    return result


def test_nemo_checkpoint_is_read_with_architecture_and_tokenizer(
    workspace: Path, nemo_dense: Path
) -> None:
    from nemo_upcycle_recipes.numbers import LLAMA_TINY_E8T2

    expected = torch_reads(nemo_dense)
    for directory in (nemo_dense, nemo_dense / "weights"):
        checkpoint = open_checkpoint(str(directory))
        assert checkpoint.tensors.keys() == expected.keys()
        for name, values in expected.items():
            assert torch.equal(read(checkpoint, name, slice(0, len(values))), values), name
        found = LLAMA_TINY_E8T2.architecture_of(str(directory))
        assert found == LLAMA_TINY_E8T2.architecture
        tokenizer = checkpoint_tokenizer(str(directory))
        text = "def f(x): return x"
        ids = tokenizer.text_to_ids(text)
        assert ids == checkpoint_tokenizer(str(workspace / "tokenizer")).text_to_ids(text)


def test_recipe_trains_from_a_nemo_checkpoint(
    ranks: RankPool, workspace: Path, nemo_dense: Path
) -> None:
    """A step with learning rate 0 leaves the experts as the dense layers that they came from."""
    results = ranks.run(
        train,
        2,
        directory=workspace,
        options={
            "name": "from-nemo",
            "max_steps": 1,
            "dense_checkpoint": str(nemo_dense),
            "expert_model_parallel_size": 2,
        },
        overrides={
            "optim.config.lr": 0.0,
            "optim.config.min_lr": 0.0,
            "optim.lr_scheduler.min_lr": 0.0,
            "trainer.limit_val_batches": 0,
            "log.ckpt": None,
        },
    )
    errors = [result for result in results if isinstance(result, str)]
    assert not errors
    losses = results[0][0]
    assert losses and all(torch.isfinite(torch.tensor(losses)))
    found = whole([shard for _, shards in results for shard in shards])
    for name, values in torch_reads(nemo_dense).items():
        if ".mlp.linear_fc2." in name:
            experts = [found[name.replace(".mlp.", f".mlp.experts.{e}.")] for e in range(8)]
            assert all(torch.equal(expert, values) for expert in experts), name
        elif "linear_qkv.weight" in name or name.startswith(("embedding.", "output_layer.")):
            assert torch.equal(found[name], values), name

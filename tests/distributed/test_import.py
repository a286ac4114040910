"""What is exported can be read back: as a NeMo 2 checkpoint, and by any ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_upcycle.checkpoint import MegatronCheckpoint
from nemo_upcycle.checkpoint.kept import kept_of
from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.trained.export import export
from nemo_upcycle.trained.opened import open_trained
from tests.distributed.pool import RankPool
from tests.distributed.step0 import TOLERANCE, dense_logits, opened_logits
from tests.distributed.trained import KINDS, WEIGHTS, import_ckpt, trained
from tests.thorough import thorough_but
from tests.tiny import tokens, write_dense


def exported(ranks: RankPool, directory: Path, kind: str) -> Path:
    saved, _ = trained(ranks, directory, kind, ParallelFolding(), 1)
    export(saved, directory / "hf")
    return directory / "hf"


@pytest.mark.parametrize("kind", thorough_but(KINDS, "plain", "everything"))
def test_there_and_back_is_the_same(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    first = exported(ranks, tmp_path, kind)
    ranks.run(import_ckpt, 1, source=first, output=tmp_path / "nemo")
    export(tmp_path / "nemo", tmp_path / "again")
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (first / name).read_bytes(), name


SAID = {"bos_token_id": 3, "eos_token_id": [7, 9], "pad_token_id": 5, "sliding_window": 16}
GENERATION = {"do_sample": True, "temperature": 0.6, "eos_token_id": [7, 9, 11]}


def test_what_the_configs_say_comes_back(ranks: RankPool, tmp_path: Path) -> None:
    """Of an MoE, through NeMo and out again; and of a dense model, for what it will become."""
    first = exported(ranks, tmp_path, "plain")
    change(first, **SAID)
    (first / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    ranks.run(import_ckpt, 1, source=first, output=tmp_path / "nemo")
    export(tmp_path / "nemo", tmp_path / "again")
    ours, theirs = (
        json.loads((path / "config.json").read_text()) for path in (first, tmp_path / "again")
    )
    assert ours == theirs
    name = "generation_config.json"
    assert (first / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    dense = write_dense(tmp_path / "mistral", "mistral", **SAID)
    (dense / name).write_text(json.dumps(GENERATION))
    ranks.run(import_ckpt, 1, source=dense, output=tmp_path / "dense_nemo")
    assert kept_of(tmp_path / "dense_nemo") == kept_of(dense)
    assert kept_of(dense)["generation_config"] == GENERATION


@pytest.mark.parametrize("family", ["llama", "qwen2, tied", "nemotron"])
def test_a_dense_model_is_imported(ranks: RankPool, tmp_path: Path, family: str) -> None:
    dense = write_dense(tmp_path / "dense", family)
    ranks.run(import_ckpt, 1, source=dense, output=tmp_path / "nemo")
    ids = tokens(rows=2, length=32)
    (found,) = ranks.run(opened_logits, 1, source=tmp_path / "nemo", ids=ids)
    assert (found - dense_logits(dense, ids)).abs().max() <= TOLERANCE


def test_bf16_stays_bf16(ranks: RankPool, tmp_path: Path) -> None:
    first = exported(ranks, tmp_path, "shared expert")
    tensors = {name: values.bfloat16() for name, values in load_file(first / WEIGHTS).items()}
    save_file(tensors, first / WEIGHTS, {"format": "pt"})
    ranks.run(import_ckpt, 1, source=first, output=tmp_path / "nemo")
    stored = MegatronCheckpoint(tmp_path / "nemo", experts=True).tensors
    assert {info.dtype for info in stored.values()} == {"BF16"}
    export(tmp_path / "nemo", tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def change(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_config_of_transformers_5(ranks: RankPool, tmp_path: Path) -> None:
    first = exported(ranks, tmp_path, "q and k norm")
    expected = open_trained(first).model
    config = json.loads((first / "config.json").read_text())
    config["num_local_experts"] = config.pop("num_experts")
    config["dtype"] = config.pop("torch_dtype")
    theta, _ = config.pop("rope_theta"), config.pop("rope_scaling")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    (first / "config.json").write_text(json.dumps(config))
    assert open_trained(first).model == expected


def test_what_megatron_does_not_compute_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    first = exported(ranks, tmp_path, "softmax first")
    tensors = load_file(first / WEIGHTS)
    gate = "model.layers.1.mlp.shared_expert_gate.weight"
    save_file(tensors | {gate: tensors[gate] + 1}, first / WEIGHTS, {"format": "pt"})
    with pytest.raises(UpcyclingError, match="no gate of the shared expert"):
        open_trained(first)
    save_file(tensors, first / WEIGHTS, {"format": "pt"})
    for name, value, message in (
        ("shared_expert_intermediate_size", 97, "expected at most the dense layer's width"),
        ("shared_expert_intermediate_size", 7, "of the wrong shape|expected"),
        ("use_sliding_window", True, "use_sliding_window"),
        ("model_type", "deepseek_v3", "families that can be read"),
    ):
        original = json.loads((first / "config.json").read_text())[name]
        change(first, **{name: value})
        with pytest.raises(UpcyclingError, match=message):
            open_trained(first)
        change(first, **{name: original})


@pytest.mark.parametrize("damage", ["missing", "left over", "of another shape"])
def test_a_damaged_directory_is_refused(ranks: RankPool, tmp_path: Path, damage: str) -> None:
    first = exported(ranks, tmp_path, "plain")
    tensors = load_file(first / WEIGHTS)
    name = "model.layers.2.block_sparse_moe.experts.3.w2.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "left over":
        tensors["model.layers.2.block_sparse_moe.experts.8.w2.weight"] = tensors[name].clone()
    else:
        tensors[name] = tensors[name][:, 1:].contiguous()
    save_file(tensors, first / WEIGHTS, {"format": "pt"})
    with pytest.raises(AssertionError, match=r"experts\.[38]\."):
        ranks.run(import_ckpt, 1, source=first, output=tmp_path / "nemo")
    assert not (tmp_path / "nemo").exists()


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("plain", {"num_key_value_heads": 8}),
        ("plain", {"num_key_value_heads": 2}),
        ("plain", {"intermediate_size": 32}),
        ("q and k norm", {"moe_intermediate_size": 48}),
        ("q and k norm", {"num_experts": 4}),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(
    ranks: RankPool, tmp_path: Path, kind: str, config: dict
) -> None:
    first = exported(ranks, tmp_path, kind)
    open_trained(first)
    change(first, **config)
    with pytest.raises(UpcyclingError, match="of the wrong shape"):
        open_trained(first)

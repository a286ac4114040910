"""Statistics of a dense model: those of the whole model, however they are computed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from nemo_upcycle.calibration import calibrate as calibration
from nemo_upcycle.calibration import lanes
from nemo_upcycle.calibration.calibrate import Calibration, calibrate
from nemo_upcycle.calibration.layer import DenseLayer, embeddings
from nemo_upcycle.calibration.text import read_sources
from nemo_upcycle.checkpoint.branches import open_branches
from nemo_upcycle.data.checks import DataWarning
from nemo_upcycle.data.encoder import load_encoder
from nemo_upcycle.data.preparation import Preparation, prepare
from nemo_upcycle.data.tokenizer import train_tokenizer
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.initializers.statistics import read_manifest
from tests.calibrations import LENGTH, calibrated, write_calibratable, write_texts
from tests.tiny import FAMILIES, tokens

CPU = torch.device("cpu")
Arrays = dict[str, Any]
RANK = 5
FULL: dict[str, Any] = {"second_moment": "full", "cluster_rank": RANK}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    return write_calibratable(tmp_path_factory.mktemp("model"), tokenizer)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [
        {"positive": ["a router of experts", "dense"], "negative": ["日本 token"]},
        {"positive": ["def f(): return 1"]},
    ]
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def statistics(model: Path, texts: tuple[str, ...], prompts: Path, tmp_path_factory: Any) -> Path:
    out = tmp_path_factory.mktemp("out") / "statistics"
    return calibrated(model, texts, out, **FULL, prompts=prompts)


def whole(model: Path, ids: Any) -> list[tuple[Any, Any]]:
    """Return inputs and activations of each feed-forward layer, by the whole model."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    seen: list[list[Any]] = [[], []]
    for layer in loaded.model.layers:
        for kind, module in enumerate((layer.mlp, layer.mlp.down_proj)):
            module.register_forward_pre_hook(lambda _, args, k=kind: seen[k].append(args[0][0]))
    with torch.no_grad():
        loaded(torch.as_tensor(ids, dtype=torch.long)[None])
    return list(zip(*seen, strict=True))


def dense_weights(model: Path, layer: int) -> Any:
    """Return gate and up of a layer, one after another, [2 · ffn, hidden]."""
    tensors = load_file(model / "model.safetensors")
    mlp = f"model.layers.{layer}.mlp."
    return np.concatenate([tensors[f"{mlp}{name}_proj.weight"] for name in ("gate", "up")])


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_those_of_the_whole_model(family: str, tmp_path: Path, tokenizer: Path) -> None:
    model = write_calibratable(tmp_path, tokenizer, family)
    ids = tokens(1, 40)[0].numpy().astype(np.int32)
    checkpoint = open_branches(str(model))
    hidden = embeddings(checkpoint, ids)
    for layer, (inputs, neurons) in enumerate(whole(model, ids)):
        seen = DenseLayer(checkpoint, layer, 0, CPU).compute(hidden)
        assert torch.allclose(seen.inputs, inputs, atol=1e-5)
        assert torch.allclose(seen.neurons, neurons, atol=1e-5)
        hidden = seen.outputs


def test_statistics_are_those_of_the_whole_model(
    statistics: Path, model: Path, texts: tuple[str, ...], prompts: Path
) -> None:
    found = load_file(statistics)
    encoder = load_encoder(model)
    sources = read_sources(texts, 500, encoder, LENGTH)
    assert [source.tokens for source in sources] == [250, 250]
    of_sources = [[whole(model, ids) for ids in source.sequences] for source in sources]
    for layer in range(3):
        inputs = [torch.cat([each[layer][0] for each in some]).numpy() for some in of_sources]
        sizes = [torch.cat([each[layer][1] for each in some]).abs().numpy() for some in of_sources]
        x, a = np.concatenate(inputs).astype(float), np.concatenate(sizes)
        active = a >= np.sort(a, axis=1)[:, [-(a.shape[1] // 10)]]
        prefix = f"layers.{layer}."
        expected = {
            "input.mean": x.mean(0),
            "input.second_moment": x.T @ x / len(x),
            "neurons.magnitude": a.mean(0),
            "neurons.rate": active.mean(0),
            "sources.1.input.mean": inputs[1].mean(0),
            "sources.0.neurons.magnitude": sizes[0].mean(0),
        }
        for name, values in expected.items():
            assert np.allclose(found[prefix + name], values, atol=1e-4), name
        # Every centroid is the direction of the mean of the inputs nearest to it.
        units = x / np.linalg.norm(x, axis=1, keepdims=True)
        centroids = found[prefix + "clusters.centroids"]
        own = (units @ centroids.T).argmax(1)
        for number, centroid in enumerate(centroids):
            mean = units[own == number].mean(0)
            assert np.allclose(centroid, mean / np.linalg.norm(mean), atol=1e-4)
            # No matrix of the rank is nearer for the cluster's inputs.
            weights = dense_weights(model, layer)
            left = np.linalg.svd(weights @ x[own == number].T)[0][:, :RANK]
            to_rank, from_rank = found[prefix + "clusters.basis"][number].astype(float)
            fitted = weights @ to_rank.T @ from_rank
            assert np.allclose(fitted, left @ left.T @ weights, atol=1e-5)
        assert np.allclose(np.bincount(own) / len(own), found[prefix + "clusters.share"])
        first, second = (json.loads(line) for line in prompts.read_text().splitlines())
        for kind, expert, some in (
            ("positive", 0, first["positive"]),
            ("negative", 0, first["negative"]),
            ("positive", 1, second["positive"]),
        ):
            means = [whole(model, ids)[layer][0].mean(0).numpy() for ids in encoder.tokens(some)]
            assert np.allclose(
                found[f"{prefix}prompts.{kind}"][expert], np.mean(means, 0), atol=1e-4
            )
        assert not found[prefix + "prompts.negative"][1].any()


@pytest.mark.thorough
def test_any_number_of_processes_writes_the_same_bytes(
    statistics: Path, model: Path, texts: tuple[str, ...], prompts: Path, tmp_path: Path
) -> None:
    for processes in (2, 3):
        out = tmp_path / str(processes)
        calibrated(model, texts, out, processes, **FULL, prompts=prompts)
        assert out.read_bytes() == statistics.read_bytes()
        assert [path.name for path in tmp_path.glob("*")] == [out.name]
        out.unlink()


@pytest.mark.parametrize("lane", [0, 17, 40, 71])
def test_goes_on_after_a_kill(
    lane: int,
    statistics: Path,
    model: Path,
    texts: tuple[str, ...],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = []
    real = lanes._compute

    def computed(*args: Any) -> None:
        if len(done) == lane:
            raise KeyboardInterrupt
        done.append(1)
        real(*args)

    monkeypatch.setattr(lanes, "_compute", computed)
    options: Any = {**FULL, "prompts": prompts}
    with pytest.raises(KeyboardInterrupt):
        calibrated(model, texts, tmp_path / "out", **options)
    monkeypatch.setattr(lanes, "_compute", lambda *args: (done.append(1), real(*args)))
    calibrated(model, texts, tmp_path / "out", **options)
    assert (tmp_path / "out").read_bytes() == statistics.read_bytes()
    # Each text has 11 sequences in as many lanes, each of two experts has a lane of prompts.
    assert len(done) == 3 * (2 * 11 + 2)
    monkeypatch.setattr(lanes, "_compute", lambda *args: pytest.fail("computed again"))
    calibrated(model, texts, tmp_path / "out", **options)


def test_seed_text_and_checkpoint_decide(
    model: Path, tokenizer: Path, texts: tuple[str, ...], tmp_path: Path
) -> None:
    other = write_calibratable(tmp_path / "other", tokenizer, seed=1)
    variants = {
        "first": calibrated(model, texts, tmp_path / "1", sample=100),
        "seed": calibrated(model, texts, tmp_path / "2", sample=100, seed=9),
        "text": calibrated(model, texts[::-1], tmp_path / "3", sample=100),
        "model": calibrated(other, texts, tmp_path / "4", sample=100),
    }
    names = ("layers.1.clusters.centroids", "layers.1.sources.0.input.mean")
    found = {key: load_file(path) for key, path in variants.items()}
    for key in ("seed", "text", "model"):
        differ = [not np.array_equal(found["first"][n], found[key][n]) for n in names]
        assert differ == [True, key != "seed"], key


def test_tokenized_data_are_the_text_that_they_were_made_of(
    model: Path, tokenizer: Path, texts: tuple[str, ...], tmp_path: Path
) -> None:
    prefix = tmp_path / "data" / "tokens"
    prepare(Preparation((texts[0],), tokenizer, prefix))
    of_text = load_file(calibrated(model, texts[:1], tmp_path / "1"))
    of_tokens = load_file(calibrated(model, (f"{prefix}.bin",), tmp_path / "2"))
    assert all(np.array_equal(of_tokens[name], values) for name, values in of_text.items())
    train_tokenizer([Path(texts[1])], tmp_path / "other", 270)
    prepare(Preparation((texts[0],), tmp_path / "other", tmp_path / "data" / "others"))
    with pytest.raises(UpcyclingError, match="others was made with another tokenizer, which"):
        calibrated(model, (str(tmp_path / "data" / "others.bin"),), tmp_path / "3")
    (tmp_path / "data" / "others.manifest.json").unlink()
    with pytest.warns(DataWarning, match="others seems to be made with another tokenizer"):
        calibrated(model, (str(tmp_path / "data" / "others.bin"),), tmp_path / "4")
    with pytest.raises(UpcyclingError, match="nowhere"):
        calibrated(model, (str(tmp_path / "nowhere.bin"),), tmp_path / "3")


def test_each_branch_computes_its_text(
    model: Path, tokenizer: Path, texts: tuple[str, ...], tmp_path: Path
) -> None:
    """With the feed-forward layers of its own, and averages of all other weights."""
    other = write_calibratable(tmp_path / "other", tokenizer, seed=1)
    both = f"{model}; {other}"
    found = load_file(calibrated(both, texts, tmp_path / "out"))
    averaged = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    second = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    with torch.no_grad():
        for (name, mine), theirs in zip(
            averaged.named_parameters(), second.parameters(), strict=True
        ):
            mine.copy_(theirs if ".mlp." in name else (mine + theirs) / 2)
    averaged.save_pretrained(tmp_path / "averaged")
    source = read_sources(texts, 500, load_encoder(model), LENGTH)[1]
    inputs = [whole(tmp_path / "averaged", ids)[2][0] for ids in source.sequences]
    mean = torch.cat(inputs).mean(0).numpy()
    assert np.allclose(found["layers.2.sources.1.input.mean"], mean, atol=1e-4)
    with pytest.raises(UpcyclingError, match="1 sources of text; expected 2, one per dense"):
        calibrated(both, texts[:1], tmp_path / "more")


def test_what_cannot_be_calibrated(
    model: Path, texts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "second moment is 'half'; expected one of: none, diagonal, full": {"second_moment": "half"},
        "clusters is 0; expected 1 or more": {"clusters": 0},
        "cluster rank is 65; expected 0 for none, or up to the hidden size, 64": {
            "cluster_rank": 65
        },
        "There are 3 tokens to cluster; expected at least 4": {"sample": 3},
        "no file nowhere.jsonl": {"texts": ("nowhere.jsonl",)},
    }
    for message, options in wrong.items():
        some = options.pop("texts", texts)
        with pytest.raises(UpcyclingError, match=message):
            calibrated(model, some, tmp_path / "out", **options)
    prompts = tmp_path / "prompts"
    prompts.write_text('{"positive": []}\n')
    with pytest.raises(UpcyclingError, match="prompts:1: expected the prompts of an expert"):
        calibrated(model, texts, tmp_path / "out", prompts=prompts)
    monkeypatch.setattr(calibration.shutil, "disk_usage", lambda _: type("", (), {"free": 1000})())
    with pytest.raises(UpcyclingError, match=r"the disk has 1000 B\. Give fewer --tokens"):
        calibrated(model, texts, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["prompts"]


def test_other_statistics_are_left_alone(
    statistics: Path, model: Path, texts: tuple[str, ...]
) -> None:
    before = statistics.read_bytes()
    with pytest.raises(UpcyclingError, match="holds other statistics"):
        calibrated(model, texts, statistics)
    assert statistics.read_bytes() == before
    manifest = read_manifest(statistics)
    assert [text["name"] for text in manifest["texts"]] == ["text0.jsonl", "text1.jsonl"]
    assert (manifest["seed"], manifest["sequence_length"]) == (1234, LENGTH)


def test_progress_reaches_the_end(model: Path, texts: tuple[str, ...], tmp_path: Path) -> None:
    shown: list[tuple[Any, ...]] = []
    job = Calibration(str(model), texts, tmp_path / "out", tokens=200, clusters=2)
    calibrate(job, progress=lambda *said: shown.append(said))
    assert shown[-1] == (600, 600, "layer 3 of 3")
    assert shown == sorted(shown)

"""Expert initializers that read statistics."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file

from nemo_upcycle.checkpoint.branches import open_branches
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.engine.initializers import check_initializers
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.initializers import make_initializer
from tests.calibrations import RANK, write_statistics
from tests.unit.initializers.layers import (
    EXPERTS,
    FFN,
    Weights,
    initialized,
    neurons_of,
    write_layers,
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_layers(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def tensors(dense: Path) -> Weights:
    return load_file(dense / "model.safetensors")


@pytest.fixture(scope="module")
def statistics(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_statistics(tmp_path_factory.mktemp("statistics") / "file", dense)


def most_active(statistics: Path, layer: int) -> list[int]:
    found = load_numpy(statistics)
    rate, size = (found[f"layers.{layer}.neurons.{name}"] for name in ("rate", "magnitude"))
    return sorted(range(FFN), key=lambda neuron: (-rate[neuron], -size[neuron], neuron))


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_shards_get_neurons_by_activity(
    dense: Path, tensors: Weights, statistics: Path, parts: int
) -> None:
    text = f"activation_sorted(stats={str(statistics)!r})"
    experts = initialized(dense, text, parts, granularity=2, weight_scaling="none")
    for (layer, expert), found in experts.items():
        order = most_active(statistics, layer)
        own = order[: FFN // 2] if expert % 2 == 0 else order[FFN // 2 :]
        for kind, values in neurons_of(tensors, layer).items():
            assert torch.equal(found[kind], values[own])
    config = UpcyclingConfig(num_moe_experts=4, granularity=2, initializer=text)
    assert config.exactness(gated=True, dense_checkpoints=1).exact


def test_each_branch_is_sorted_by_its_own_text(dense: Path, tmp_path: Path) -> None:
    other = write_layers(tmp_path / "other", seed=1)
    both = f"{dense}; {other}"
    file = write_statistics(tmp_path / "file", both)
    found = load_numpy(file)
    experts = initialized(both, f"activation_sorted(stats={str(file)!r})", granularity=2)
    for (layer, expert), parts in experts.items():
        branch = expert // 2 % 2
        rate = found[f"layers.{layer}.sources.{branch}.neurons.rate"]
        order = (-rate).argsort(kind="stable")[expert % 2 * FFN // 2 :][: FFN // 2].copy()
        weights = load_file(Path((dense, other)[branch]) / "model.safetensors")
        assert torch.equal(parts["gate"], neurons_of(weights, layer)["gate"][order])


@pytest.mark.parametrize("shared", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("granularity", [1, 2])
def test_partial_keeps_the_most_active(
    dense: Path, tensors: Weights, statistics: Path, shared: float, granularity: int
) -> None:
    text = f"partial(stats={str(statistics)!r}, shared={shared})"
    width = FFN // granularity
    options: dict[str, Any] = {"granularity": granularity, "weight_scaling": "none"}
    one, two = (initialized(dense, text, parts, **options) for parts in (1, 5))
    for (layer, expert), found in one.items():
        first = expert % granularity * width
        own = [n - first for n in most_active(statistics, layer) if first <= n < first + width]
        kept = own[: int(shared * width)]
        for kind, values in neurons_of(tensors, layer).items():
            same = (found[kind] == values[first : first + width]).all(dim=1)
            assert same.nonzero().flatten().tolist() == sorted(kept)
            assert torch.equal(found[kind], two[layer, expert][kind])
    assert shared == 1 or not torch.equal(one[0, 0]["up"], one[0, granularity]["up"])


def test_initializers_check_their_statistics(dense: Path, statistics: Path, tmp_path: Path) -> None:
    other = open_branches(str(write_layers(tmp_path, seed=1)))
    for text in (
        "activation_sorted(stats={})",
        "partial(stats={})",
        "hybrid(copy, partial(stats={}))",
    ):
        config = UpcyclingConfig(initializer=text.format(repr(str(statistics))))
        check_initializers(config, open_branches(str(dense)))
        with pytest.raises(UpcyclingError, match="is of another dense checkpoint"):
            check_initializers(config, other)
    with pytest.raises(UpcyclingError, match="partial: shared is 2; expected a number from 0 to 1"):
        make_initializer("partial(stats='a', shared=2)")


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("granularity", [1, 2])
def test_cluster_svd_maps_gate_and_up_through_the_clusters_basis(
    dense: Path, tensors: Weights, tmp_path: Path, rank: int | None, granularity: int
) -> None:
    copies = EXPERTS // granularity
    file = write_statistics(tmp_path / "file", dense, clusters=copies)
    text = f"cluster_svd(stats={str(file)!r}, rank={rank})"
    options: dict[str, Any] = {"granularity": granularity, "weight_scaling": "none"}
    one, cut = (initialized(dense, text, parts, **options) for parts in (1, 5))
    width = FFN // granularity
    for (layer, expert), found in one.items():
        first = expert % granularity * width
        to_rank, from_rank = load_numpy(file)[f"layers.{layer}.clusters.basis"][
            expert // granularity
        ]
        for kind, values in neurons_of(tensors, layer).items():
            own = values[first : first + width]
            expected = own.numpy() @ to_rank[:rank].T @ from_rank[:rank]
            if kind == "down":
                assert torch.equal(found[kind], own)
            else:
                assert np.allclose(found[kind], expected, atol=1e-5)
            assert torch.equal(found[kind], cut[layer, expert][kind])


def test_cluster_svd_needs_its_statistics(dense: Path, tmp_path: Path) -> None:
    checkpoint = open_branches(str(dense))
    file = write_statistics(tmp_path / "file", dense)

    def check(text: str, **config: Any) -> None:
        initializer = text.format(repr(str(file)))
        check_initializers(UpcyclingConfig(initializer=initializer, **config), checkpoint)

    check("cluster_svd(stats={})")
    check("cluster_svd(stats={})", num_moe_experts=16, granularity=2)
    with pytest.raises(UpcyclingError, match="has 8 clusters per layer; expected 4, one per copy"):
        check("cluster_svd(stats={})", num_moe_experts=4)
    with pytest.raises(UpcyclingError, match=f"of rank {RANK} per cluster; cluster_svd needs 9"):
        check("cluster_svd(stats={}, rank=9)")
    with pytest.raises(UpcyclingError, match="cluster_svd: rank is 0; expected a whole number"):
        check("cluster_svd(stats={}, rank=0)")
    write_statistics(file, dense, cluster_rank=0)
    with pytest.raises(UpcyclingError, match="Calibrate with --cluster-rank"):
        check("cluster_svd(stats={})")

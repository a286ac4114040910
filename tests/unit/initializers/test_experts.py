"""What expert initializers make of the dense layer's neurons."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.initializers import make_initializer, names
from tests.third_party import install_flip
from tests.unit.initializers.layers import (
    EXPERTS,
    FFN,
    HIDDEN,
    LAYERS,
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


def test_copy_changes_nothing(dense: Path, tensors: Weights) -> None:
    for (layer, _), parts in initialized(dense, "copy").items():
        for kind, values in neurons_of(tensors, layer).items():
            assert torch.equal(parts[kind], values)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.333, 0.5, 1.0])
@pytest.mark.parametrize("granularity", [1, 2])
def test_drop_draws_just_as_many_neurons_and_leaves_the_others(
    dense: Path, tensors: Weights, ratio: float, granularity: int
) -> None:
    experts = initialized(
        dense, f"drop(ratio={ratio})", granularity=granularity, weight_scaling="none"
    )
    width = FFN // granularity
    chosen = set()
    for (layer, expert), parts in experts.items():
        start = expert % granularity * width
        masks = []
        for kind, values in neurons_of(tensors, layer).items():
            masks.append((parts[kind] != values[start : start + width]).any(dim=1))
            assert (parts[kind] != values[start : start + width])[masks[-1]].all()
        assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
        assert int(masks[0].sum()) == int(ratio * width)
        chosen.add(tuple(masks[0].tolist()))
    if 0 < ratio < 1:
        assert len(chosen) == LAYERS * EXPERTS, "all experts drop the same neurons"


def test_dropped_neurons_have_the_dense_layers_statistics(dense: Path, tensors: Weights) -> None:
    for (layer, _), parts in initialized(dense, "drop(ratio=1)").items():
        for kind, values in neurons_of(tensors, layer).items():
            count = values.numel()  # 25,600: the sample's std is within 0.44% (1 sigma)
            assert abs(float(parts[kind].std() / values.std()) - 1) < 4 / (2 * count) ** 0.5
            error = float(parts[kind].mean() - values.mean())
            assert abs(error) < 4 * float(values.std()) / count**0.5


def test_statistics_are_of_the_tensor_at_hand(dense: Path, tmp_path: Path) -> None:
    """Not of another part, layer, or of numbers that are alike everywhere."""
    from safetensors.torch import save_file

    changed = load_file(dense / "model.safetensors")
    changed["model.layers.1.mlp.up_proj.weight"].add_(3.0).mul_(2.0)
    save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((dense / "config.json").read_text())
    experts = initialized(tmp_path, "drop(ratio=1)")
    means = {(layer, kind): v.mean() for (layer, _), p in experts.items() for kind, v in p.items()}
    for place, mean in means.items():
        assert float(mean) == pytest.approx(6.0 if place == (1, "up") else 0.0, abs=0.05)


def test_noise_is_as_asked(dense: Path, tensors: Weights) -> None:
    std, fraction = 0.03, 0.25
    for (layer, _), parts in initialized(dense, f"noise(std={std},fraction={fraction})").items():
        for kind, values in neurons_of(tensors, layer).items():
            added = (parts[kind] - values).flatten().numpy()
            changed = added[added != 0]
            count = added.size
            sigma = (fraction * (1 - fraction) / count) ** 0.5
            assert abs(changed.size / count - fraction) < 5 * sigma
            assert abs(changed.mean()) < 5 * std / changed.size**0.5
            assert abs(changed.std() / std - 1) < 5 / (2 * changed.size) ** 0.5


def test_random_is_megatrons_initialization(dense: Path) -> None:
    expected = json.loads((dense / "config.json").read_text())["initializer_range"]
    for parts in initialized(dense, "random").values():
        assert float(parts["gate"].std()) == pytest.approx(expected, rel=0.02)
        assert float(parts["up"].std()) == pytest.approx(expected, rel=0.02)
        assert float(parts["down"].std()) == pytest.approx(expected / (2 * LAYERS) ** 0.5, rel=0.02)


@pytest.mark.parametrize("initializer", ["noise(fraction=1)", "random", "drop(ratio=1)"])
def test_all_draws_are_independent(dense: Path, tensors: Weights, initializer: str) -> None:
    """No two of layers, experts, parts and neurons have correlated draws."""
    rows = []
    for (layer, _), parts in initialized(dense, initializer).items():
        for kind, values in neurons_of(tensors, layer).items():
            drawn = parts[kind] - values if initializer.startswith("noise") else parts[kind]
            rows.append(drawn[:20] / drawn.std())
    correlations = torch.corrcoef(torch.cat(rows))
    largest = float((correlations - torch.eye(len(correlations))).abs().max())
    # Of 480 rows of 64 values: 115,000 pairs with a standard deviation of 1/8.
    assert largest < 0.75


def test_hybrid_gives_each_copy_its_own(dense: Path, tensors: Weights) -> None:
    experts = initialized(dense, "hybrid(copy, random(std=2.0))")
    for (layer, expert), parts in experts.items():
        if expert % 2:
            assert float(parts["up"].std()) == pytest.approx(2.0, rel=0.02)
        else:
            assert torch.equal(parts["up"], neurons_of(tensors, layer)["up"])
    granular = initialized(
        dense, "hybrid(copy, random(std=2.0))", granularity=2, weight_scaling="none"
    )
    changed = [
        expert for (layer, expert), p in granular.items() if layer == 0 and p["up"].std() > 1
    ]
    assert changed == [2, 3], "experts 0 and 1 are the first copy, 2 and 3 the second"


@pytest.mark.parametrize("initializer", ["noise", "drop", "random"])
def test_values_do_not_depend_on_how_an_expert_is_cut(dense: Path, initializer: str) -> None:
    whole = initialized(dense, initializer, granularity=2)
    for parts in (2, 4):
        cut = initialized(dense, initializer, parts=parts, granularity=2)
        for place, expected in whole.items():
            for kind, values in expected.items():
                assert torch.equal(cut[place][kind], values)


def test_values_do_not_depend_on_the_size_of_blocks(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = initialized(dense, "drop")
    monkeypatch.setattr("nemo_upcycle.engine.experts.BLOCK_BYTES", 4 * HIDDEN * 7)
    for place, expected in initialized(dense, "drop").items():
        for kind, values in expected.items():
            assert torch.equal(whole[place][kind], values)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package of somebody else's, with an initializer."""
    yield install_flip(tmp_path)
    sys.modules.pop("flipping", None)


def test_another_packages_initializer(
    package: Path, dense: Path, tensors: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UpcyclingError, match="no initializer 'flip'"):
        make_initializer("flip")
    monkeypatch.syspath_prepend(package)
    assert "flip" in names()
    for (layer, _), parts in initialized(dense, "flip(fraction=0.25)").items():
        down = neurons_of(tensors, layer)["down"]
        flipped = (parts["down"] == -down).all(dim=1)
        assert int(flipped.sum()) == FFN // 4
        assert torch.equal(parts["down"][~flipped], down[~flipped])

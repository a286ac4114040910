"""What expert initialisers make of the dense layer's neurons."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file

from nemo_upcycle.checkpoint.branches import open_branches
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.engine.experts import initialize_experts
from nemo_upcycle.engine.initializers import check_initializers
from nemo_upcycle.engine.owned_shards import OwnedShard
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.initializers import make_initializer, names
from nemo_upcycle.plans.rank import Shard
from tests.calibrations import write_statistics
from tests.third_party import install_flip
from tests.tiny import write_llama

HIDDEN, FFN, EXPERTS, LAYERS = 64, 400, 4, 2
PARTS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense")
    return write_llama(directory, intermediate_size=FFN, num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def tensors(dense: Path) -> Weights:
    return load_file(dense / "model.safetensors")


def neurons_of(tensors: Weights, layer: int) -> Weights:
    """Return the dense layer's parts, [neurons, hidden]."""
    found = {p: tensors[f"model.layers.{layer}.mlp.{n}.weight"] for p, n in PARTS.items()}
    return found | {"down": found["down"].T}


def initialized(
    dense: Path | str, initializer: str, parts: int = 1, **config: Any
) -> dict[tuple[int, int], Weights]:
    """Return the experts' parts by layer and expert, after copies of the layer were initialised.

    Args:
        dense: The dense checkpoint.
        initializer: The initialiser.
        parts: Ranks that each expert is cut over.
        config: Other fields of `UpcyclingConfig`.
    """
    upcycling = UpcyclingConfig(num_moe_experts=EXPERTS, initializer=initializer, **config)
    checkpoint = open_branches(str(dense))
    width = FFN // upcycling.granularity
    tensors = load_file(checkpoint.directory / "model.safetensors")
    result: dict[tuple[int, int], Weights] = {}
    for part in range(parts):
        rows = slice(part * width // parts, (part + 1) * width // parts)
        owned = []
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                start = upcycling.neurons(expert, FFN)[0]
                name = f"decoder.layers.{layer}.mlp.experts.{expert}."
                for place, (kind, values) in enumerate(neurons_of(tensors, layer).items()):
                    data = values[start : start + width][rows].clone()
                    if kind == "down":
                        shard = Shard(
                            name + "linear_fc2.weight",
                            (HIDDEN, width),
                            (0, rows.start),
                            (HIDDEN, len(data)),
                        )
                        owned.append(OwnedShard(shard, data.T.contiguous()))
                    else:
                        offset = (place * width + rows.start, 0)
                        shard = Shard(
                            name + "linear_fc1.weight", (2 * width, HIDDEN), offset, data.shape
                        )
                        owned.append(OwnedShard(shard, data))
        initialize_experts(owned, checkpoint, upcycling)
        for (layer, expert), found in by_expert(owned).items():
            whole = result.setdefault((layer, expert), {})
            for kind, values in found.items():
                whole[kind] = torch.cat([whole[kind], values]) if kind in whole else values
    return result


def by_expert(owned: list[OwnedShard]) -> dict[tuple[int, int], Weights]:
    found: dict[tuple[int, int], Weights] = {}
    kinds = iter(list(PARTS) * (len(owned) // 3))
    for own in owned:
        layer, expert = (int(word) for word in own.shard.name.split(".") if word.isdigit())
        kind = next(kinds)
        values = own.data.T if kind == "down" else own.data
        found.setdefault((layer, expert), {})[kind] = values
    return found


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


def test_random_is_megatrons_initialisation(dense: Path) -> None:
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
    """An installed package of somebody else's, with an initialiser."""
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


# --- With statistics -----------------------------------------------------------------------------


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
    other = write_llama(tmp_path / "other", intermediate_size=FFN, num_hidden_layers=LAYERS, seed=1)
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
    other = open_branches(
        str(write_llama(tmp_path, intermediate_size=FFN, num_hidden_layers=LAYERS, seed=1))
    )
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

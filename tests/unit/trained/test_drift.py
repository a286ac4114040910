"""How far an upcycled model's weights are from the dense ones."""

from pathlib import Path

import pytest
import torch

from nemo_upcycle.checkpoint import DenseCheckpoint, open_checkpoint
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.trained.drift import Drift, drift
from nemo_upcycle.trained.opened import open_trained
from tests.megatron_checkpoints import FFN, LAYER, LAYERS, save_nemo, tensors
from tests.moe_checkpoints import KINDS, Kind, Weights, moe_weights, save_moe

FC1, FC2 = ".linear_fc1.weight", ".linear_fc2.weight"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseCheckpoint:
    return open_checkpoint(str(save_nemo(tmp_path_factory.mktemp("dense") / "saved", tensors())))


def upcycled(kind: Kind) -> Weights:
    """Return the weights of copies of the dense model's feed-forward layers."""
    stored = tensors()
    apart = {
        name.replace(LAYER, f"{LAYER}{layer}."): values[layer]
        for name, values in stored.items() if name.startswith(LAYER)
        for layer in range(LAYERS)
    }  # fmt: skip
    dense = {n: v for n, v in stored.items() if not n.startswith(LAYER)} | apart
    found = {}
    for name, values in moe_weights(kind).items():
        if "router" in name:
            found[name] = values
        elif ".experts." in name:
            prefix, _, rest = name.partition("experts.")
            expert, _, part = rest.partition(".")
            found[name] = neurons(dense[prefix + part], part, int(expert), kind.width)
        else:
            whole = name.replace("shared_experts.", "")
            whole = whole.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
            found[name] = dense[whole]
    return found


def neurons(values: torch.Tensor, part: str, expert: int, width: int) -> torch.Tensor:
    """Return an expert's part of a dense layer."""
    start = expert % (FFN // width) * width
    if part.startswith("linear_fc2"):
        return values[:, start : start + width]
    return torch.cat([half[start : start + width] for half in values.chunk(2)])


def found(dense: DenseCheckpoint, directory: Path, kind: Kind, weights: Weights) -> Drift:
    return drift(dense, open_trained(save_moe(directory / "moe", kind, weights)))


COPIES = {
    "plain": KINDS["plain"],
    "granular": KINDS["granular"],
    "shared expert": KINDS["partly dense, shared expert"],
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_have_not_moved(dense: DenseCheckpoint, tmp_path: Path, name: str) -> None:
    seen = found(dense, tmp_path, COPIES[name], upcycled(COPIES[name]))
    assert seen.untouched
    assert (seen.others, seen.experts) == (0.0, 0.0)
    parts = {"gate", "up", "down"}
    shared = {f"shared {part}" for part in parts} if COPIES[name].shared else set()
    assert seen.scales.keys() == parts | shared
    assert set(seen.scales.values()) == {1.0}


def test_scales_are_found(dense: DenseCheckpoint, tmp_path: Path) -> None:
    weights = upcycled(KINDS["plain"])
    for name in weights:
        if name.endswith(FC2) and ".experts." in name:
            weights[name] = weights[name] * 2.5
    seen = found(dense, tmp_path, KINDS["plain"], weights)
    assert seen.scales == {"gate": 1.0, "up": 1.0, "down": pytest.approx(2.5)}
    assert seen.untouched


@pytest.mark.parametrize("shared", [False, True])
def test_one_neuron_that_moved_is_seen(
    dense: DenseCheckpoint, tmp_path: Path, shared: bool
) -> None:
    kind = COPIES["shared expert"]
    weights = upcycled(kind)
    inside = "shared_experts" if shared else "experts.2"
    name = f"decoder.layers.1.mlp.{inside}{FC1}"
    before = weights[name]
    weights[name] = before.clone()
    weights[name][3] += 1
    seen = found(dense, tmp_path, kind, weights)
    assert not seen.untouched
    gate = before.chunk(2)[0]
    assert seen.experts == pytest.approx(float(8**0.5 / gate.norm()), rel=0.2)
    assert seen.others == 0


@pytest.mark.parametrize(
    "name",
    ["embedding.word_embeddings.weight", "decoder.layers.1.self_attention.linear_qkv.weight"],
)
def test_other_weights_that_moved_are_seen(
    dense: DenseCheckpoint, tmp_path: Path, name: str
) -> None:
    weights = upcycled(KINDS["plain"])
    weights[name] = weights[name] * 1.01
    seen = found(dense, tmp_path, KINDS["plain"], weights)
    assert seen.others == pytest.approx(0.01, rel=1e-3)
    assert seen.experts == 0


def test_a_rounded_model_is_compared_with_rounded_weights(
    dense: DenseCheckpoint, tmp_path: Path
) -> None:
    weights = {name: values.bfloat16() for name, values in upcycled(KINDS["plain"]).items()}
    assert found(dense, tmp_path, KINDS["plain"], weights).untouched


def test_progress_ends_at_all_pairs(dense: DenseCheckpoint, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    source = save_moe(tmp_path / "moe", KINDS["plain"], upcycled(KINDS["plain"]))
    drift(dense, open_trained(source), lambda *at: seen.append(at))
    # Embeddings, last norm and output layer; of each layer 4 parameters and 2 an expert.
    assert [done for done, _ in seen] == list(range(1, 3 + 2 * (4 + 2 * 4) + 1))
    assert {total for _, total in seen} == {len(seen)}


def test_a_dense_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    other = open_checkpoint(
        str(save_nemo(tmp_path / "dense", {**tensors(), **longer()}, vocab_size=20))
    )
    source = save_moe(tmp_path / "moe", KINDS["plain"], upcycled(KINDS["plain"]))
    with pytest.raises(UpcyclingError, match="not of one shape: vocab_size 20 and 16"):
        drift(other, open_trained(source))


def longer() -> Weights:
    names = ("embedding.word_embeddings.weight", "output_layer.weight")
    return {name: torch.zeros(20, 8) for name in names}

"""Neurons of a dense checkpoint in the order of another's."""

from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.trained.aligned import align, matching
from tests.tiny import FAMILIES, tokens, write_dense, write_llama


def logits(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens(2, 16)).logits


def shuffled(dense: Path, directory: Path, noise: float = 0.0) -> Path:
    """Write a Llama whose neurons are in another order, with noise."""
    tensors = load_file(dense / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name in [each for each in tensors if each.endswith("gate_proj.weight")]:
        order = torch.randperm(len(tensors[name]), generator=generator)
        for kind, axis in (("gate", 0), ("up", 0), ("down", 1)):
            own = name.replace("gate", kind)
            tensors[own] = tensors[own].index_select(axis, order)
            tensors[own] += noise * torch.randn(tensors[own].shape, generator=generator)
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text((dense / "config.json").read_text())
    return directory


def test_neurons_come_back_to_their_places(tmp_path: Path) -> None:
    dense = write_llama(tmp_path / "dense")
    found = align(dense, shuffled(dense, tmp_path / "other"), tmp_path / "out")
    written, expected = (load_file(d / "model.safetensors") for d in (tmp_path / "out", dense))
    assert all(torch.equal(written[name], values) for name, values in expected.items())
    assert found.moved > 0.9
    assert found.before > 1 > found.after == 0
    noisy = align(dense, shuffled(dense, tmp_path / "noisy", 0.01), tmp_path / "out2")
    assert 0 < noisy.after < noisy.before


@pytest.mark.parametrize("family", FAMILIES)
def test_the_copy_computes_the_same(tmp_path: Path, family: str) -> None:
    first, second = (write_dense(tmp_path / str(seed), family, seed=seed) for seed in (0, 1))
    before = (second / "config.json").read_bytes()
    found = align(first, second, tmp_path / "out")
    assert found.moved > 0.5
    assert found.after < found.before
    assert torch.allclose(logits(tmp_path / "out"), logits(second), atol=1e-5)
    assert (tmp_path / "out" / "config.json").read_bytes() == before


def test_the_order_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (
        {part: torch.randn(5, 3, generator=generator) for part in ("gate", "up", "down")}
        for _ in range(2)
    )

    def likeness(order: tuple[int, ...]) -> float:
        return sum(float((ours[p] * theirs[p][list(order)]).sum()) for p in ours)

    best = max(permutations(range(5)), key=likeness)
    assert tuple(matching(ours, theirs).tolist()) == best


def test_what_cannot_be_aligned(tmp_path: Path) -> None:
    dense = write_llama(tmp_path / "dense")
    wide = write_llama(tmp_path / "wide", intermediate_size=128)
    with pytest.raises(UpcyclingError, match="are not of one architecture: ffn_hidden_size"):
        align(dense, wide, tmp_path / "out")
    with pytest.raises(UpcyclingError, match="exists; expected a new directory"):
        align(dense, dense, wide)
    assert not (tmp_path / "out").exists()

"""Checkpoints are told apart, and tied embeddings from untied ones."""

import json
import shutil
from dataclasses import make_dataclass, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from nemo_upcycle.checkpoint import HuggingFaceCheckpoint
from nemo_upcycle.checkpoint.checks import check_tensors
from nemo_upcycle.checkpoint.fingerprint import check_tied, fingerprint
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture, family_of
from tests.tiny import write_llama


def _with_output_layer(dense: Path, directory: Path, tied: bool, shift: float) -> Path:
    """Copy the checkpoint with an output layer that is the embeddings, shifted."""
    shutil.copytree(dense, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + shift
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    return directory


def test_tied_embeddings_with_another_output_layer(dense: Path, tmp_path: Path) -> None:
    directory = _with_output_layer(dense, tmp_path / "dense", tied=True, shift=1.0)
    with pytest.raises(UpcyclingError, match="says that the embeddings are tied"):
        check_tied(HuggingFaceCheckpoint(directory))


def test_tied_embeddings_stored_twice(dense: Path, tmp_path: Path) -> None:
    directory = _with_output_layer(dense, tmp_path / "dense", tied=True, shift=0.0)
    checkpoint = HuggingFaceCheckpoint(directory)
    family = family_of(checkpoint.config)
    check_tensors(checkpoint.tensors, family, family.architecture(checkpoint.config), "here")
    check_tied(checkpoint)


def test_untied_embeddings_without_an_output_layer(dense: Path) -> None:
    checkpoint = HuggingFaceCheckpoint(dense)
    family = family_of(checkpoint.config)
    arch = family.architecture(checkpoint.config)
    tensors = {name: info for name, info in checkpoint.tensors.items() if name != "lm_head.weight"}
    with pytest.raises(UpcyclingError, match="missing: lm_head"):
        check_tensors(tensors, family, arch, "here")


def test_fingerprint_tells_checkpoints_apart(dense: Path, tmp_path: Path) -> None:
    same = write_llama(tmp_path / "same", shard_size="180KB")
    other = write_llama(tmp_path / "other", seed=1)
    first, sharded, second = (
        fingerprint(HuggingFaceCheckpoint(path)) for path in (dense, same, other)
    )
    assert first == sharded != second


def test_a_new_field_of_the_architecture_changes_no_fingerprint(dense: Path) -> None:
    """Runs and statistics of earlier versions stay known, unless the field is used."""
    checkpoint = HuggingFaceCheckpoint(dense)
    before, arch = fingerprint(checkpoint), checkpoint.architecture
    later = make_dataclass("Later", [("new", int, 0)], bases=(Architecture,), frozen=True)
    vars(checkpoint)["architecture"] = later(**vars(arch))
    assert fingerprint(checkpoint) == before
    vars(checkpoint)["architecture"] = later(**vars(arch), new=1)
    assert fingerprint(checkpoint) != before
    vars(checkpoint)["architecture"] = replace(arch, rotary_base=arch.rotary_base + 1)
    assert fingerprint(checkpoint) != before

"""Checkpoints are told apart, and tied embeddings from untied ones."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from nemo_upcycle.checkpoint import HuggingFaceCheckpoint
from nemo_upcycle.checkpoint.checks import check_tensors
from nemo_upcycle.checkpoint.fingerprint import check_tied, fingerprint
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import family_of
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

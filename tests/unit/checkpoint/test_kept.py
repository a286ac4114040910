"""What a dense model's configs say and training does not change is found, and recorded as data."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import Metadata

from nemo_upcycle.checkpoint import HuggingFaceCheckpoint
from nemo_upcycle.checkpoint.kept import (
    default_tokens,
    dense_checkpoints_in,
    kept_in,
    kept_of,
)
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.engine.provenance import Origin
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import FAMILIES
from nemo_upcycle.families.moe_config import MOE_FAMILIES
from tests.tiny import CONFIG

LLAMA = {"model_type": "llama", **CONFIG}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}


def directory(path: Path, config: dict[str, Any], **files: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file({}, path / "model.safetensors")
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_the_context_is_the_models_own(tmp_path: Path) -> None:
    for number, (config, length, window) in enumerate(
        (
            (LLAMA, 128, None),
            ({**LLAMA, "model_type": "mistral", "sliding_window": 16}, 128, 16),
            (MIXTRAL | {"sliding_window": 32}, 128, 32),
        )
    ):
        found = kept_of(directory(tmp_path / str(number), config))
        assert (found["max_position_embeddings"], found["sliding_window"]) == (length, window)
        assert found["model_type"] == config["model_type"]


def test_tokens_as_the_config_says_them(tmp_path: Path) -> None:
    """A list stays a list, null stays null, and what is not said is not made up."""
    said = {"eos_token_id": [5, 7], "bos_token_id": None, "pad_token_id": 0}
    found = kept_of(directory(tmp_path / "said", LLAMA | said | {"tokenizer_class": "X"}))
    assert found["config"] == said | {"tokenizer_class": "X"}
    assert found["generation_config"] == {
        "_from_model_config": True,
        "eos_token_id": [5, 7],
        "pad_token_id": 0,
    }
    unsaid = kept_of(directory(tmp_path / "unsaid", LLAMA))
    assert (unsaid["config"], unsaid["generation_config"]) == ({}, None)


@pytest.mark.parametrize("kind", [*FAMILIES, *MOE_FAMILIES])
def test_tokens_that_no_config_says_are_transformers(kind: str) -> None:
    config = transformers.AutoConfig.for_model(kind)
    assert default_tokens(kind) == {name: getattr(config, name) for name in default_tokens(kind)}


def test_generation_config(tmp_path: Path) -> None:
    own = {"do_sample": True, "temperature": 0.6, "eos_token_id": [1, 2], "custom": "kept"}
    found = kept_of(directory(tmp_path / "own", LLAMA, generation_config=own))
    assert found["generation_config"] == own
    older = LLAMA | {"temperature": 0.6, "do_sample": True}
    assert kept_of(directory(tmp_path / "older", older))["generation_config"] == {
        "_from_model_config": True,
        "do_sample": True,
        "temperature": 0.6,
    }
    for text in ("{", "[]", "\x00"):
        (tmp_path / "own" / "generation_config.json").write_text(text)
        with pytest.raises(UpcyclingError, match=r"generation_config.json (cannot be read|holds)"):
            kept_of(tmp_path / "own")


def test_templates_beside_the_tokenizers(tmp_path: Path) -> None:
    dense = directory(tmp_path / "dense", LLAMA)
    (dense / "additional_chat_templates").mkdir()
    (dense / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    assert kept_of(HuggingFaceCheckpoint(dense))["chat_templates"] == {
        "tool_use.jinja": "{{ tools }}"
    }


def test_a_checkpoint_without_its_common_file_is_damaged(tmp_path: Path) -> None:
    """Without the record of this file, an export would pass for one of an older version."""
    metadata = Metadata(state_dict_metadata={}, storage_data={})  # and no common state in it
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    for read in (kept_in, dense_checkpoints_in):
        with pytest.raises(UpcyclingError, match=r"common\.pt is missing"):
            read(tmp_path)


class Other:
    """An object of another callback."""

    called = False

    def __setstate__(self, state: Any) -> None:
        Other.called = True


def test_a_record_among_other_callbacks_objects(tmp_path: Path) -> None:
    """No object of another callback is made, and what is no record is passed over."""
    kept = kept_of(directory(tmp_path / "dense", LLAMA))
    other = Other()
    other.value = 1  # type: ignore[attr-defined]
    states = {
        "A": {"best": other, "kept": other, "tensor": torch.ones(2)},
        "B": [other],
        "C": {"kept": {"max_position_embeddings": "many"}},
        "D": {"kept": {"max_position_embeddings": 128, "config": {"x": other}}},
    }
    torch.save({"callbacks": states}, tmp_path / "common.pt")
    assert kept_in(tmp_path) is None
    origin = Origin.of("dense", None, UpcyclingConfig(), kept)
    torch.save({"callbacks": states | {"U": vars(origin)}}, tmp_path / "common.pt")
    assert kept_in(tmp_path) == kept
    assert not Other.called
    torch.save({"state": other}, tmp_path / "common.pt")
    assert kept_in(tmp_path) is None
    assert kept_in(tmp_path / "dense") is None

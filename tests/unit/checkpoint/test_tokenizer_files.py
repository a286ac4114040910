"""Tokenizers that people have: as transformers 4 and 5 save them, sentencepiece alone, foreign."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.checkpoint.tokenizer_files import (
    TokenizerWarning,
    doubtful_end,
    load_alone,
    load_tokenizer,
)
from nemo_upcycle.data.encoder import load_encoder
from nemo_upcycle.errors import UpcyclingError
from tests.tokenizers import change_config, write_sentencepiece, write_tokenizer

TEXT = "def see(the_end):\n    return 'a text in the vocabulary, 日本'"


def transformers4(directory: Path) -> Path:
    return write_tokenizer(directory, "BPE")


def tokenizers_backend(directory: Path) -> Path:
    """As transformers 5 saves it."""
    said = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True}
    extra = {"extra_special_tokens": ["<tool_call>"], "added_tokens_decoder": None}
    return change_config(transformers4(directory), **said, **extra)


def list_of_special_tokens(directory: Path) -> Path:
    return change_config(transformers4(directory), extra_special_tokens=["<tool_call>"])


def a_class_that_is_not_known(directory: Path) -> Path:
    return change_config(transformers4(directory), tokenizer_class="TokenizerOfTomorrow")


def config_alone(directory: Path) -> Path:
    """`tokenizer.json` beside the model's config, which says the class and the ids."""
    (transformers4(directory) / "tokenizer_config.json").unlink()
    (directory / "special_tokens_map.json").unlink(missing_ok=True)
    config = {"model_type": "llama", "eos_token_id": 2, "bos_token_id": 1}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def generic_config(directory: Path) -> Path:
    config_alone(directory)
    (directory / "config.json").write_text('{"model_type": "of_tomorrow", "eos_token_id": [2, 5]}')
    return directory


def two_lines(directory: Path) -> Path:
    return write_sentencepiece(directory, tokenizer_class="LlamaTokenizer", eos_token="</s>")


def sentencepiece_bpe(directory: Path) -> Path:
    return write_sentencepiece(directory, "bpe", tokenizer_class="LlamaTokenizer")


def sentencepiece_and_config(directory: Path) -> Path:
    write_sentencepiece(directory)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory


def sentencepiece_alone(directory: Path) -> Path:
    return write_sentencepiece(directory)


KINDS = (transformers4, tokenizers_backend, list_of_special_tokens, a_class_that_is_not_known,
         config_alone, generic_config, two_lines, sentencepiece_bpe, sentencepiece_and_config,
         sentencepiece_alone)  # fmt: skip


def expected_ids(directory: Path) -> list[int]:
    if (directory / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(directory / "tokenizer.json")).encode(TEXT).ids
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(directory / "tokenizer.model")).encode(TEXT)


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_what_people_have_is_loaded(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """By itself, alone in a directory as training takes it, and saved by NeMo into a context."""
    import shutil

    from transformers import AutoTokenizer

    directory = make(tmp_path / "tokenizer")
    loaded, alone = load_alone(directory)
    assert loaded.eos_token_id == 2
    assert loaded.encode(TEXT, add_special_tokens=False) == expected_ids(directory)
    assert next(iter(load_encoder(directory).tokens([TEXT]))) == expected_ids(directory)
    assert not (alone / "config.json").exists()
    shutil.copytree(alone, tmp_path / "context")
    for place in (alone, tmp_path / "context"):
        again = AutoTokenizer.from_pretrained(str(place))
        assert again.eos_token_id == 2
        assert again.encode(TEXT) == loaded.encode(TEXT)
    fingerprints = {load_encoder(place).fingerprint() for place in (directory, alone)}
    assert len(fingerprints) == 1


def test_another_users_directory_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = transformers4(tmp_path / "tokenizer")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    theirs = load_alone(directory)[1].parent
    theirs.rename(tmp_path / "elsewhere")
    theirs.symlink_to(tmp_path / "elsewhere")
    assert load_alone(directory)[1].parent != theirs


def test_a_lone_tokenizer_ends_documents_with_the_one_end_that_it_has(tmp_path: Path) -> None:
    """And says so: nothing else does."""
    config_alone(tmp_path / "a")
    (tmp_path / "a" / "config.json").unlink()
    with pytest.warns(
        TokenizerWarning, match="no setting says which token ends a document; .* </s>"
    ):
        assert load_tokenizer(tmp_path / "a").eos_token_id == 2


def own_code(directory: Path) -> Path:
    code = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    change_config(transformers4(directory), tokenizer_class="OwnTokenizer", auto_map=code)
    (directory / "own.py").write_text("raise SystemExit('executed')")
    return directory


def own_code_of_the_model(directory: Path) -> Path:
    config_alone(directory)
    code = {"AutoTokenizer": ["own.OwnTokenizer", None], "AutoConfig": "own.OwnConfig"}
    config = {"model_type": "own", "auto_map": code}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text("raise SystemExit('executed')")
    return directory


def no_json(directory: Path) -> Path:
    (transformers4(directory) / "tokenizer_config.json").write_text("{")
    return directory


def damaged(directory: Path) -> Path:
    (transformers4(directory) / "tokenizer.json").write_text('{"model": 1}')
    return directory


def damaged_model(directory: Path) -> Path:
    (two_lines(directory) / "tokenizer.model").write_bytes(b"no model")
    return directory


def nothing(directory: Path) -> Path:
    directory.mkdir()
    return directory


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (own_code, "is code of its own"),
        (own_code_of_the_model, "is code of its own"),
        (no_json, "cannot be read as JSON"),
        (damaged, "cannot be loaded"),
        (damaged_model, "cannot be loaded"),
        (nothing, "holds no tokenizer; expected one of .* Name the directory"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_loaded_is_one_line(
    make: Callable[[Path], Path], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is asked, and no code of a checkpoint is executed."""
    monkeypatch.setattr("builtins.input", None)
    directory = make(tmp_path / "tokenizer")
    with pytest.raises(UpcyclingError, match=message) as error:
        load_tokenizer(directory)
    assert "\n" not in str(error.value)
    assert str(directory) in str(error.value)


def test_own_code_beside_a_class_that_is_known_is_left_alone(tmp_path: Path) -> None:
    """transformers takes the class that transformers has, too."""
    code = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    directory = change_config(transformers4(tmp_path / "a"), auto_map=code)
    assert load_tokenizer(directory).eos_token_id == 2


# --- The end of a document -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("configs", "doubt"),
    [
        ({}, None),
        ({"config.json": 2}, None),
        ({"config.json": 1}, "stops at <s>, as its configs say"),
        ({"generation_config.json": [1, 2]}, None),
        ({"config.json": 1, "generation_config.json": [2]}, None),
        ({"generation_config.json": [0, 1]}, "stops at <unk>, <s>, as its configs say"),
    ],
)
def test_an_end_that_is_not_the_models_is_told(
    tmp_path: Path, configs: dict[str, Any], doubt: str | None
) -> None:
    directory = transformers4(tmp_path / "a")
    for name, eos in configs.items():
        (directory / name).write_text(json.dumps({"model_type": "llama", "eos_token_id": eos}))
    found = doubtful_end(load_tokenizer(directory), directory)
    assert (found is None) == (doubt is None)
    assert doubt is None or doubt in str(found)

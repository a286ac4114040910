"""The files of a tokenizer: find, copy and load them."""

import atexit
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEEDED = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Files that are a tokenizer; one is enough."""

SETTINGS = "tokenizer_config.json"

VOCABULARIES = (*NEEDED, SETTINGS, "merges.txt", "added_tokens.json")
"""Files that map tokens to ids."""

_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)

_GENERIC = "PreTrainedTokenizerFast"
"""transformers' class for any `tokenizer.json`; `TokenizersBackend` in transformers 5."""

_ENDS_OF_TEXT = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<｜end▁of▁sentence｜>")
"""Tokens that end a document in well-known base models."""


_ENDS_OF_TURN = (
    "<|im_end|>",
    "<|im_start|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end|>",
)
"""Tokens that end a turn in a chat, but not a document."""


class TokenizerWarning(UserWarning):
    """A tokenizer is usable, but may not be the intended one."""


def find_tokenizer(directory: Path, context: Path | None) -> Path | None:
    """Return the directory of a checkpoint's tokenizer; None if there is none.

    Args:
        directory: The checkpoint's directory.
        context: NeMo 2's `context`, which has a directory for the tokenizer.
    """
    places = [directory]
    if context is not None:
        places += sorted(path for path in context.iterdir() if path.is_dir())
    usable = (p for p in places if any((p / name).is_file() for name in NEEDED))
    return next(usable, None)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy only the tokenizer's files from a directory, which may hold weights too."""
    for path in _files(source):
        shutil.copy(path, target / path.name)


def _files(directory: Path) -> list[Path]:
    files = {path for pattern in _PATTERNS for path in directory.glob(pattern) if path.is_file()}
    return sorted(files)


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """Load a tokenizer from disk as transformers does, but without executing code or prompting.

    Args:
        directory: Directory of the tokenizer, or of a checkpoint with a tokenizer.
            `tokenizer.json` or `tokenizer.model` is enough.

    Raises:
        UpcyclingError: There is no tokenizer, or the tokenizer cannot be loaded.
    """
    return load_alone(directory)[0]


def load_alone(directory: Path) -> "tuple[PreTrainedTokenizerBase, Path]":
    """Load a tokenizer; also return a permanent directory with only the tokenizer's files.

    The directory is among the temporary files, one per content, so that killed processes leave at
    most one. `tokenizer_config.json` there has all settings for loading, in the format of
    transformers 4. NeMo copies the whole directory into every checkpoint's context.

    Raises:
        UpcyclingError: As `load_tokenizer`.
    """
    if not directory.is_dir():  # transformers would look for the name on the hub
        raise UpcyclingError(
            f"no tokenizer directory at {directory}; expected one with {' or '.join(NEEDED)}. "
            "Check the path (relative paths start where the command runs)."
        )
    if not any((directory / name).is_file() for name in NEEDED):
        raise UpcyclingError(
            f"{directory} holds no tokenizer; expected one of {', '.join(NEEDED)}. Name the "
            "directory that has the model's tokenizer; in a recipe, by tokenizer='DIR'."
        )
    said = _read(directory / SETTINGS)
    settings = _settings(directory, said)
    alone = _alone(directory, said, settings)
    tokenizer = _load(directory, alone)
    if eos := _missing_eos(directory, settings, tokenizer):
        alone = _alone(directory, said, settings | {"eos_token": eos})
        tokenizer = _load(directory, alone)
    tokenizer.name_or_path = str(directory)
    return tokenizer, alone


def model_eos(directory: Path) -> list[int]:
    """Return the tokens at which a checkpoint's model stops, from the configs; may be empty."""
    for name in ("generation_config.json", "config.json"):
        eos = _read(directory / name).get("eos_token_id")
        if eos is not None:
            check_token_ids(eos, "eos_token_id", directory / name)
            return eos if isinstance(eos, list) else [eos]
    return []


def check_token_ids(value: Any, key: str, path: Path) -> None:
    """Check that a config value is a token id, a list of ids, or null.

    Raises:
        UpcyclingError: The value is something else.
    """
    each = value if isinstance(value, list) else [value]
    if value is not None and (not each or any(type(token) is not int for token in each)):
        raise UpcyclingError(
            f"{path} says {key}={value!r}; expected the id of a token, a list of them, or null."
        )


def doubtful_end(tokenizer: "PreTrainedTokenizerBase", model: Path) -> str | None:
    """Return why the token that ends documents may not be the intended one; None if plausible.

    Args:
        tokenizer: The tokenizer.
        model: Directory of the dense checkpoint whose configs count.
    """
    eos, expected = tokenizer.eos_token_id, model_eos(model)
    if eos is None:
        return None
    ending = f"{tokenizer.name_or_path}: documents end with its eos token {tokenizer.eos_token}"
    if expected and eos not in expected:
        names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(expected)))
        return (
            f"{ending} (id {eos}), but the model in {model} stops at {names}, as its configs say."
        )
    if tokenizer.eos_token in _ENDS_OF_TURN:
        return f"{ending}, which is the end of a turn in a chat; text ends with another token."
    return None


def _settings(directory: Path, said: dict[str, Any]) -> dict[str, Any]:
    """Return `tokenizer_config.json` in the format of transformers 4, with the class."""
    settings = dict(said)
    # A list in transformers 5; in transformers 4 a mapping from names to a model's own tokens.
    if isinstance(settings.get("extra_special_tokens"), list):
        extra = settings.pop("extra_special_tokens")
        settings.setdefault("additional_special_tokens", extra)
    if isinstance(own := settings.pop("model_specific_special_tokens", None), dict):
        settings["extra_special_tokens"] = own
    config = _read(directory / "config.json")
    named = settings.get("tokenizer_class") or config.get("tokenizer_class")
    known = _class_of(named, str(config.get("model_type")))
    code = settings.pop("auto_map", None) or (not named and config.get("auto_map"))
    if not known and (not isinstance(code, dict) or "AutoTokenizer" in code) and code:
        raise UpcyclingError(
            f"{directory}: its tokenizer is code of its own (auto_map in {SETTINGS}), and no code "
            "of a checkpoint is executed. Give a directory with a tokenizer.json and a "
            "tokenizer_class that transformers has."
        )
    if not known and (directory / "tokenizer.json").is_file():
        known = _GENERIC
    settings["tokenizer_class"] = known or named or "LlamaTokenizerFast"
    return settings


def _class_of(named: str | None, model_type: str) -> str | None:
    """Return the class that transformers uses; None if there is none."""
    from transformers.models.auto.tokenization_auto import (
        TOKENIZER_MAPPING_NAMES,
        tokenizer_class_from_name,
    )

    if named is None:
        slow, fast = TOKENIZER_MAPPING_NAMES.get(model_type, (None, None))
        return fast or slow
    classes = (tokenizer_class_from_name(name) for name in (named, f"{named}Fast"))
    return named if any(classes) else None


def _load(directory: Path, alone: Path) -> "PreTrainedTokenizerBase":
    import transformers

    auto_tokenizer: Any = transformers.AutoTokenizer  # has no type annotations
    try:
        return auto_tokenizer.from_pretrained(
            str(alone), use_fast=True, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers, tokenizers and sentencepiece raise many kinds
        said = str(error).replace(str(alone), str(directory)).strip() or "no reason given"
        raise UpcyclingError(
            f"the tokenizer in {directory} cannot be loaded: {type(error).__name__}: "
            f"{said.splitlines()[0]}"
        ) from error


def _missing_eos(
    directory: Path, settings: dict[str, Any], tokenizer: "PreTrainedTokenizerBase"
) -> str | None:
    """Return the token that ends a document if the tokenizer's files do not set it.

    A class's default may be a token that is not in the vocabulary.
    """
    said = "eos_token" in settings or "eos_token" in _read(directory / "special_tokens_map.json")
    vocabulary = _vocabulary(directory)
    if said or (tokenizer.eos_token is not None and tokenizer.eos_token in vocabulary):
        return None
    by_id = {number: token for token, number in vocabulary.items()}
    if eos := next((by_id[each] for each in model_eos(directory) if each in by_id), None):
        return eos
    known = [token for token in _ENDS_OF_TEXT if token in vocabulary]
    if len(known) != 1 or (directory / SETTINGS).is_file():  # the settings then mean: no eos token
        return None
    warnings.warn(
        f"{directory}: no setting says which token ends a document; assuming {known[0]}. Set "
        f'"eos_token" in {SETTINGS} there.',
        TokenizerWarning,
        stacklevel=3,
    )
    return known[0]


def _vocabulary(directory: Path) -> dict[str, int]:
    """Return tokens and ids from the files, without tokens that a class adds."""
    from tokenizers import Tokenizer

    if not (directory / "tokenizer.json").is_file():
        return {}
    return Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UpcyclingError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UpcyclingError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content


def _alone(directory: Path, said: dict[str, Any], settings: dict[str, Any]) -> Path:
    """Return a directory with a tokenizer's files, and with adapted settings if needed."""
    files = {path.name: path.read_bytes() for path in _files(directory)}
    if settings != said:
        files[SETTINGS] = json.dumps(settings, indent=2, ensure_ascii=False).encode()
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}:{len(content)}:".encode() + content)
    place = place_of(digest.hexdigest())
    _fill(place, files)
    return place / "tokenizer"


def place_of(digest: str) -> Path:
    """Return a directory among the temporary files, made if needed, which is this user's alone."""
    place = Path(tempfile.gettempdir()) / f"nemo-upcycle-{os.getuid()}-{digest[:16]}"
    place.mkdir(mode=0o700, exist_ok=True)
    if place.is_symlink() or place.stat().st_uid != os.getuid():  # others could change the files
        place = Path(tempfile.mkdtemp(prefix="nemo-upcycle-"))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def _fill(place: Path, files: Mapping[str, bytes]) -> None:
    """Write missing or incomplete files; other processes may do so at the same time."""
    alone = place / "tokenizer"
    alone.mkdir(exist_ok=True)
    for name, content in files.items():
        path = alone / name
        if path.is_file() and path.read_bytes() == content:
            continue
        partial = place / f"{name}.{os.getpid()}"  # not inside: NeMo copies the whole directory
        partial.write_bytes(content)
        partial.replace(path)

"""The manifest of a dataset: inputs, outputs and checksums."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcyclingError

COPY_BYTES = 2**24


@dataclass(frozen=True)
class Manifest:
    """Inputs and outputs of a dataset, stored as `PREFIX.manifest.json`.

    Attributes:
        documents: Number of documents written.
        tokens: Number of tokens written, including one end-of-document token per document.
        empty: Number of documents without a token, which are left out.
        left_out: Number of records that the selection excludes.
        malformed: Number of lines or rows that are not documents; see `PREFIX.malformed.jsonl`.
        contaminated: Number of documents left out because they share words with an evaluation item;
            see `PREFIX.contaminated.jsonl`.
        dtype: Type of the tokens.
        job: Inputs: sources with sizes, tokenizer, selection.
        sources: The same counts per source.
        files: Size in bytes and sha256 of each of the dataset's files.
        tokenizer: `fingerprint` (see `Encoder.fingerprint`), `eos` (the id that ends documents) and
            `parse_special` (whether spelled special tokens were encoded as such). None in manifests
            of older versions.
        spelled: Number of special tokens spelled out in texts.
        largest_id: Largest token id written; None in manifests of older versions.
    """

    documents: int
    tokens: int
    empty: int
    left_out: int
    malformed: int
    contaminated: int
    dtype: str
    job: dict[str, Any]
    sources: list[dict[str, Any]]
    files: dict[str, dict[str, Any]]
    tokenizer: dict[str, Any] | None = None
    spelled: int = 0
    largest_id: int | None = None


def manifest_of(prefix: Path) -> Manifest | None:
    """Return a dataset's manifest without comparing the files; None if there is no manifest.

    Raises:
        UpcyclingError: The file is not a manifest.
    """
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        return Manifest(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UpcyclingError(f"{path}: not a manifest: {error}. Remove it to start anew.") from None


def manifest_path(prefix: Path) -> Path:
    """Return the path of a dataset's manifest."""
    return prefix.with_name(prefix.name + ".manifest.json")


def read_manifest(prefix: Path) -> Manifest | None:
    """Return a dataset's manifest; None if the dataset is incomplete."""
    manifest = manifest_of(prefix)
    if manifest is None:
        return None
    sizes = {name: prefix.with_name(name) for name in manifest.files}
    complete = all(
        file.is_file() and file.stat().st_size == manifest.files[name]["bytes"]
        for name, file in sizes.items()
    )
    return manifest if complete else None


def check_files(prefix: Path, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Compare a dataset's files with the manifest's checksums.

    Args:
        prefix: Path of the dataset, without `.bin` and `.idx`.
        progress: Called with the bytes read and the bytes in total.

    Raises:
        UpcyclingError: The dataset is incomplete, or a file differs from what was written.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        raise UpcyclingError(
            f"{prefix}: no complete dataset: {prefix.name}.manifest.json is missing, or a file is "
            "not as long as it says."
        )
    total, done = sum(each["bytes"] for each in manifest.files.values()), 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    for name, expected in manifest.files.items():
        if sha256_of(prefix.with_name(name), advance) != expected["sha256"]:
            raise UpcyclingError(
                f"{prefix.with_name(name)}: its sha256 is not the manifest's: it was changed or "
                "damaged. Make it anew: remove the manifest and run the same command."
            )
    return manifest


def sha256_of(path: Path, progress: Callable[[int], None] = lambda size: None) -> str:
    """Return a file's sha256; `progress` is called with the bytes of each chunk."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(COPY_BYTES):
            sha256.update(chunk)
            progress(len(chunk))
    return sha256.hexdigest()

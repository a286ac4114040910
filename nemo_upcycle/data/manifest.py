"""What went into a dataset and what came out, with checksums."""

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
    """What went in and what came out; `PREFIX.manifest.json`.

    Attributes:
        documents: Documents written.
        tokens: Their tokens, an end-of-document token for each included.
        empty: Documents without a token, left out.
        left_out: Records that were not asked for.
        malformed: Lines or rows that are no document; `PREFIX.malformed.jsonl` says where.
        contaminated: Documents that share words with an evaluation, left out;
            `PREFIX.contaminated.jsonl` says which and what.
        dtype: Of the tokens.
        job: What it was made from: sources with their sizes, tokenizer, selection.
        sources: The numbers of each source.
        files: Bytes and sha256 of the dataset's files.
        tokenizer: `Encoder.fingerprint` under `fingerprint`, the id that ends documents under
            `eos`, and whether special tokens that texts spell out were taken for them under
            `parse_special`. None where an older version wrote this.
        spelled: Special tokens that texts spelled out.
        largest_id: The largest token id written; None where an older version wrote this.
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
    """Return what a dataset's manifest says, whether or not its files are as it says.

    Raises:
        UpcyclingError: It is no manifest.
    """
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        return Manifest(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UpcyclingError(f"{path}: not a manifest: {error}. Remove it to start anew.") from None


def manifest_path(prefix: Path) -> Path:
    """Return where a dataset's manifest is."""
    return prefix.with_name(prefix.name + ".manifest.json")


def read_manifest(prefix: Path) -> Manifest | None:
    """Return a dataset's manifest, None where it is not complete."""
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
    """Compare a dataset's files with its manifest.

    Raises:
        UpcyclingError: There is no complete dataset, or a file is not what was written.
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
    """Return a file's checksum; `progress` is told the bytes of each piece."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(COPY_BYTES):
            sha256.update(chunk)
            progress(len(chunk))
    return sha256.hexdigest()

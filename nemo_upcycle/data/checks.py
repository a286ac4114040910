"""Checks before training: datasets match their manifests and fit the model."""

import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_upcycle.data.encoder import Encoder, encoder_of
from nemo_upcycle.data.index import largest_id, read_index
from nemo_upcycle.data.manifest import Manifest, manifest_of, manifest_path
from nemo_upcycle.data.paths import SUFFIXES, DataPath
from nemo_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANEW = "Make the dataset anew with `nemo-upcycle data tokenize`, or copy it again."


class DataWarning(UserWarning):
    """Data that can be trained on but may not be the intended data."""


class Dataset:
    """A dataset on disk.

    Args:
        path: Path of the dataset.

    Raises:
        UpcyclingError: A file is missing, is shorter than the index requires, or differs from the
            manifest.
    """

    def __init__(self, path: DataPath) -> None:
        self.prefix = path.prefix
        self.files = {suffix: path.file(suffix) for suffix in SUFFIXES}
        check_there(path)
        self.manifest: Manifest | None = manifest_of(Path(path.prefix))
        self.index = read_index(self.files[".idx"])
        self._check_sizes()

    @property
    def known_largest_id(self) -> int | None:
        """The largest token id if the manifest has it, else None."""
        return self.manifest.largest_id if self.manifest else None

    def largest_id(self, part: int, parts: int) -> int:
        """Return the largest token id in one of `parts` equal parts of the dataset."""
        known = self.known_largest_id
        return (
            largest_id(self.files[".bin"], self.index.dtype, part, parts)
            if known is None
            else known
        )

    def documents(self, count: int, tokens: int) -> Iterator[list[int]]:
        """Yield the first `tokens` token ids of the first `count` documents."""
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        dataset = IndexedDataset(self.prefix)
        for number in range(min(count, len(dataset))):
            yield dataset[number][:tokens].tolist()

    def _check_sizes(self) -> None:
        actual = self.files[".bin"].stat().st_size
        if actual < self.index.bin_bytes:
            raise UpcyclingError(
                f"{self.files['.bin']} has {actual:,} bytes, and {self.files['.idx'].name} says "
                f"{self.index.bin_bytes:,}: it is cut off, or of another dataset. {ANEW}"
            )
        for suffix, said in _said(self.manifest).items():
            size = self.files[suffix].stat().st_size
            changed = suffix == ".idx" and self.index.sha256 != said["sha256"]
            if size != said["bytes"] or changed:
                raise UpcyclingError(
                    f"{self.files[suffix]} is not what {manifest_path(Path(self.prefix)).name} "
                    f"says: {size:,} bytes, and {said['bytes']:,} were written"
                    f"{', others' if changed else ''}. {ANEW} Where another tool has written it, "
                    "remove the manifest."
                )


def _said(manifest: Manifest | None) -> dict[str, dict[str, Any]]:
    """Return a manifest's file entries by suffix: dataset and manifest may have been renamed."""
    files = manifest.files.items() if manifest else ()
    return {s: said for s in SUFFIXES for name, said in files if name.endswith(s)}


def check_there(path: DataPath) -> None:
    """Check that both files of a dataset can be read.

    Raises:
        UpcyclingError: A file cannot be read.
    """
    for suffix in SUFFIXES:
        file = path.file(suffix)
        try:
            with file.open("rb"):
                pass
        except OSError as error:
            raise UpcyclingError(
                f"No dataset at {path.prefix}: {file} cannot be read: {error.strerror}. Expected "
                "the path of a .bin and a .idx file without the ending; `nemo-upcycle data "
                "tokenize` writes them."
            ) from None


def check_vocabulary(prefix: str, largest: int, rows: int) -> None:
    """Check that the model has an embedding for every token id of a dataset.

    Args:
        prefix: Path of the dataset, for the error message.
        largest: Largest token id in the dataset.
        rows: Number of embeddings.

    Raises:
        UpcyclingError: The largest token id has no embedding.
    """
    if largest >= rows:
        raise UpcyclingError(
            f"{prefix} has the token id {largest}, and the model has {rows} embeddings, for ids "
            f"up to {rows - 1}. Tokenize the text with the dense checkpoint's own tokenizer, "
            "without tokens that were added to it; or resize the checkpoint's embeddings."
        )


def check_tokenizer_fits(tokenizer: Any, rows: int) -> None:
    """Check that the model has embeddings for the tokenizer's bos and eos tokens.

    Tokens that occur in no text may lie beyond the embeddings.

    Args:
        tokenizer: A NeMo tokenizer.
        rows: Number of embeddings.

    Raises:
        UpcyclingError: The bos or eos token has no embedding.
    """
    for kind in ("bos", "eos"):
        number = getattr(tokenizer, f"{kind}_id", None)
        if number is not None and number >= rows:
            raise UpcyclingError(
                f"the tokenizer's {kind} token {getattr(tokenizer, f'{kind}_token', '')} has the "
                f"id {number}, and the model has {rows} embeddings, for ids up to {rows - 1}. "
                "Give the dense checkpoint's own tokenizer: tokenizer=DIR; or resize the "
                "checkpoint's embeddings."
            )


def check_random_ids_fit(tokenizer: Any, rows: int) -> None:
    """Check that the model has an embedding for every id of mock data.

    Mock data are random ids from the tokenizer's vocabulary.

    Args:
        tokenizer: A NeMo tokenizer.
        rows: Number of embeddings.

    Raises:
        UpcyclingError: The vocabulary is larger than the number of embeddings.
    """
    size = getattr(tokenizer, "vocab_size", None)
    if size is not None and size > rows:
        raise UpcyclingError(
            f"mock data are random ids of the tokenizer's {size} tokens, and the model has {rows} "
            f"embeddings, for ids up to {rows - 1}. Give the dense checkpoint's own tokenizer: "
            "tokenizer=DIR; or data_paths=PREFIX."
        )


class TokenizerCheck:
    """Comparison of the training tokenizer with the tokenizers that made the datasets.

    Args:
        tokenizer: The training tokenizer.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._fingerprints: dict[bool, str] = {}

    def check(self, dataset: Dataset) -> None:
        """Check that a dataset was made with the training tokenizer.

        Without a tokenizer in the manifest, a mismatch of sampled documents is only a warning.

        Raises:
            UpcyclingError: The manifest names a different tokenizer.
        """
        said = dataset.manifest.tokenizer if dataset.manifest else None
        if said is None:
            self._warn_of_another(dataset)
            return
        way_out = (
            "Give the tokenizer that the dataset was made with: tokenizer=DIR, or --tokenizer DIR "
            "in a command; or make the dataset anew with this one: `nemo-upcycle data tokenize`."
        )
        if said["eos"] != self._tokenizer.eos_token_id:
            raise UpcyclingError(
                f"the documents of {dataset.prefix} end with the token id {said['eos']}, and the "
                f"tokenizer's eos token {self._tokenizer.eos_token} has the id "
                f"{self._tokenizer.eos_token_id}. {way_out}"
            )
        if said["fingerprint"] != self._fingerprint(said["parse_special"]):
            raise UpcyclingError(
                f"{dataset.prefix} was made with another tokenizer, which gives texts other token "
                f"ids. {way_out}"
            )

    def _fingerprint(self, parse_special: bool) -> str:
        if parse_special not in self._fingerprints:
            encoder = encoder_of(self._tokenizer, parse_special)
            self._fingerprints[parse_special] = encoder.fingerprint()
        return self._fingerprints[parse_special]

    @cached_property
    def _encoder(self) -> Encoder:
        return encoder_of(self._tokenizer, parse_special=True)

    def _warn_of_another(self, dataset: Dataset, count: int = 8, tokens: int = 64) -> None:
        """Warn if decoding and re-encoding the first documents gives different tokens."""
        begins = [ids for ids in dataset.documents(count, 2 * tokens) if len(ids) >= 4]
        texts = [self._tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in begins]
        again = self._encoder.tokens(texts)
        same = [ids[:k] == list(islice(new, k)) for ids, new in zip(begins, again, strict=True)
                for k in [min(tokens, len(ids) // 2)]]  # fmt: skip
        if len(same) >= 4 and 2 * sum(same) < len(same):
            warnings.warn(
                f"{dataset.prefix} seems to be made with another tokenizer: the texts of its first "
                f"{len(same)} documents get other ids from this one. Its manifest, which "
                "would say so, is missing or of an older version.",
                DataWarning,
                stacklevel=2,
            )


def check_on_login(paths: Sequence[DataPath], rows: int) -> None:
    """Check the datasets that are visible from the login node before ranks start.

    Args:
        paths: The datasets.
        rows: Number of embeddings.

    Raises:
        UpcyclingError: A visible dataset differs from its manifest or does not fit the model.
    """
    for path in paths:
        if path.is_local and path.file(".idx").is_file() and path.file(".bin").is_file():
            dataset = Dataset(path)
            if dataset.known_largest_id is not None:
                check_vocabulary(path.prefix, dataset.known_largest_id, rows)

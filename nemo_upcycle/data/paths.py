"""`data_paths`: prefixes of Megatron's datasets, each preceded by a weight in a blend."""

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.files import name_problem

MAX_NAME_BYTES = 200
"""Maximum length of a dataset's name: with suffixes, file systems allow 255 bytes."""

SUFFIXES = (".bin", ".idx")

EXPECTED = (
    "expected prefixes of .bin and .idx files, separated by spaces, each with or without a "
    "weight above 0 before it. A prefix with a space is put in quotes: "
    "data_paths='0.7 \"/my data/web\" 0.3 /data/academic'"
)


@dataclass(frozen=True)
class DataPath:
    """A dataset of a blend.

    Attributes:
        prefix: Path of the dataset without `.bin` and `.idx`.
        weight: Share relative to the other datasets; None if no weights are given.
    """

    prefix: str
    weight: float | None = None

    @property
    def is_local(self) -> bool:
        """Whether the files are on a local file system rather than in an object store."""
        return "://" not in self.prefix

    def file(self, suffix: str) -> Path:
        """Return the path of the dataset's file with this suffix."""
        return Path(self.prefix + suffix)


def check_dataset_name(name: str, what: str) -> None:
    """Check that a name is valid for a dataset's files.

    Args:
        name: The name.
        what: Origin of the name, for the error message.

    Raises:
        UpcyclingError: The name is not a valid file name, hides the files, or has spaces around it.
    """
    problem = name_problem(name, MAX_NAME_BYTES)
    if problem is None and name.startswith("."):
        problem = "which hides the files"
    if problem is None and name != name.strip():
        problem = "with spaces around it"
    if problem is not None:
        raise UpcyclingError(
            f"{what} {name!r}, {problem}; expected what its files are called without their "
            "endings, such as web. The directory is given by --out."
        )


def parse(text: str) -> list[DataPath]:
    """Parse `data_paths`: words with shell quoting.

    Args:
        text: Prefixes, each preceded by a weight in a blend. A prefix may begin with `~` and end
            with `.bin` or `.idx`.

    Raises:
        UpcyclingError: The text is not a list of prefixes or of weights and prefixes.
    """
    if _is_dataset(text.strip()):  # a single prefix may contain spaces without quotes
        return of_words([text.strip()])
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UpcyclingError(f"data_paths is {text!r}: {error}; {EXPECTED}.") from None
    return of_words(_joined(words))


def of_words(words: Sequence[str | Path | float]) -> list[DataPath]:
    """Parse a list of prefixes, or of alternating weights and prefixes.

    Raises:
        UpcyclingError: The words are not such a list.
    """
    texts = [str(word).strip() for word in words]
    if not texts:
        raise UpcyclingError(f"data_paths is empty; {EXPECTED}.")
    if not _is_weight(texts[0]):
        if weight := next(filter(_is_weight, texts), None):
            raise UpcyclingError(
                f"data_paths: {texts[0]} has no weight, and others have ({weight}); {EXPECTED}."
            )
        return [DataPath(_prefix(text)) for text in texts]
    paths = []
    for weight, prefix in zip(texts[::2], [*texts[1::2], ""], strict=False):
        if not _is_weight(weight):
            raise UpcyclingError(f"data_paths: {weight} has no weight before it; {EXPECTED}.")
        if not prefix or _is_weight(prefix):
            raise UpcyclingError(f"data_paths: no prefix after the weight {weight}; {EXPECTED}.")
        if not 0 < float(weight) < math.inf:
            raise UpcyclingError(
                f"data_paths: the weight of {prefix} is {weight}; expected more than 0. Leave out "
                "what is not to be trained on."
            )
        paths.append(DataPath(_prefix(prefix), float(weight)))
    return paths


def words_of(paths: Iterable[DataPath]) -> list[str]:
    """Return alternating weights and prefixes, or prefixes, as NeMo and Megatron expect."""
    words = []
    for path in paths:
        words += [path.prefix] if path.weight is None else [repr(path.weight), path.prefix]
    return words


def text_of(paths: Iterable[DataPath]) -> str:
    """Return the paths in the syntax of `parse`."""
    return shlex.join(words_of(paths))


def _is_weight(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _prefix(word: str) -> str:
    expanded = str(Path(word).expanduser()) if word.startswith("~") else word
    for suffix in SUFFIXES:
        if expanded.endswith(suffix) and not _is_dataset(expanded):
            return expanded.removesuffix(suffix)
    return expanded


def _is_dataset(prefix: str) -> bool:
    path = Path(prefix).expanduser()
    try:
        return bool(prefix) and path.with_name(path.name + SUFFIXES[1]).is_file()
    except (OSError, ValueError):  # not a valid file name
        return False


def _joined(words: list[str]) -> list[str]:
    """Join adjacent words that form a dataset's prefix together: a path with unquoted spaces."""
    joined = []
    while words:
        ends = range(len(words), 1, -1)
        whole = _is_weight(words[0]) or _is_dataset(_prefix(words[0]))
        joins = (end for end in ends if _is_dataset(_prefix(" ".join(words[:end]))))
        end = 1 if whole else next(joins, 1)
        joined.append(" ".join(words[:end]))
        words = words[end:]
    return joined

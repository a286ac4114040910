"""Find documents that share text with evaluation items, so that scores are not inflated.

Two texts overlap if they share a run of words, ignoring case and punctuation. Runs have 13 words,
GPT-3's upper bound (arXiv 2005.14165, appendix C). Shorter items count whole, down to 8 words.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_upcycle.data.documents import parse_line
from nemo_upcycle.errors import UpcyclingError

WORDS = 13
FEWEST_WORDS = 8

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Item:
    """An evaluation item.

    Attributes:
        task: Name of the evaluation task.
        number: Index of the item in the task.
        text: Text that must not be trained on.
    """

    task: str
    number: int
    text: str


@dataclass(frozen=True)
class Overlap:
    """The words that a document shares with an item."""

    task: str
    number: int
    words: str


class EvaluationItems:
    """Evaluation items, indexed by runs of words.

    Args:
        items: The items.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self.too_short = 0
        # By length in words: runs of 13 words, and shorter items as a whole.
        self._runs: dict[int, dict[tuple[str, ...], Item]] = {}
        for item in items:
            words = words_of(item.text)
            length = min(WORDS, len(words))
            if length < FEWEST_WORDS:
                self.too_short += 1
                continue
            runs = self._runs.setdefault(length, {})
            for run in _runs(words, length):
                runs.setdefault(run, item)
        # Most documents match no first words of a run: one look-up instead of one per length.
        self._beginnings = {run[:FEWEST_WORDS] for runs in self._runs.values() for run in runs}

    def overlap(self, text: str) -> Overlap | None:
        """Return the words that a text shares with an item; None if there is no overlap."""
        words = words_of(text)
        for start, beginning in enumerate(_runs(words, FEWEST_WORDS)):
            if beginning in self._beginnings:
                for length, runs in self._runs.items():
                    run = tuple(words[start : start + length])
                    if item := runs.get(run):
                        return Overlap(item.task, item.number, " ".join(run))
        return None


def words_of(text: str) -> list[str]:
    """Return a text's words in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def _runs(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1))


def read_items(path: Path) -> EvaluationItems:
    """Read items: JSON lines with `task`, `number` and `text`, as written by `data items`.

    Raises:
        UpcyclingError: The file is missing or empty, or a line is not an item.
    """
    if not path.is_file():
        raise UpcyclingError(f"no file {path}; `nemo-upcycle data items` writes one")
    items = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            items.append(Item(**parse_line(line)))
        except (ValueError, TypeError) as error:
            raise UpcyclingError(
                f"{path}:{number}: expected an object with task, number and text: {error}"
            ) from None
    if not items:
        raise UpcyclingError(f"{path}: no items in it")
    return EvaluationItems(items)

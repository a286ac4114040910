"""A multiple-choice task for lm-eval from held-out text: which line comes next?"""

from __future__ import annotations

import glob
import json
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

from nemo_upcycle.data.tokenizer import read_documents
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.files import check_writable, scratch_directory

MIN_CONTEXT, MAX_CONTEXT = 100, 400
MIN_LINE, MAX_LINE = 20, 120
"""Length of a context and of a line without indentation, in characters."""

# Lines after a blank line are unpredictable and excluded. Lines after trailing white space are
# excluded because lm-eval would move that white space from the context to the choices.
_NEXT_LINE = re.compile(r"(?<=\S)(\n[^\S\n]*)(\S.*)")

# Number of lines sampled as candidates for wrong choices, whatever the size of the corpus.
_POOL = 1000


class _Place(NamedTuple):
    """A candidate line: the context, the line break with indentation, and the line's text."""

    document: int
    context: str
    start: str
    text: str

    def unlike(self, other: _Place) -> tuple[bool, int]:
        """Return a sort key that is smaller for lines more similar in length and indentation."""
        similar = len(self.text) <= 2 * len(other.text) <= 4 * len(self.text)
        return not similar, abs(len(self.start) - len(other.start))


def write_choices(
    files: Sequence[Path],
    out: Path,
    name: str = "next_line",
    items: int = 500,
    choices: int = 4,
    seed: int = 1234,
    held_out: float = 0.03,
) -> int:
    """Write `<name>.jsonl` and `<name>.yaml`, a task for `lm_eval --include_path <out>`.

    An item is `{"context": ..., "choices": [...], "label": ...}`. The context is some whole lines
    of a document. The choices are the true next line and lines from other documents of the same
    file; the label is the index of the true line. Where possible, wrong lines match the true line
    in indentation and, within a factor of 2, in length. Context and right choice together are
    verbatim text of the document. Items are spread evenly over files and over documents. The same
    arguments give the same items.

    The YAML names the JSONL by absolute path because lm-eval resolves relative paths against the
    current directory. After moving the directory, write the task again.

    Args:
        files: JSONL files, each line an object with a string under "text".
        out: Output directory, created if missing. An existing task of this name is replaced.
        name: The task's name in lm-eval.
        items: Number of items.
        choices: Choices per item, including the right one.
        seed: Seed for the positions, the wrong choices and the labels.
        held_out: Share of each file's documents, from the end of the file, that items are made
            from. With Megatron's split 970,20,10, a share of at most 0.03 is never trained on.

    Returns:
        The number of items.

    Raises:
        UpcyclingError: An argument, a file or a line is invalid, or a file has too few items.
    """
    _check_arguments(files, name, items, choices, held_out)
    check_writable(out)
    rng = random.Random(seed)
    parts = [
        _items(file, len(range(i, items, len(files))), choices, held_out, rng)
        for i, file in enumerate(files)
    ]
    _write_task(out, name, [parts[i % len(files)][i // len(files)] for i in range(items)])
    return items


def _items(
    file: Path, wanted: int, choices: int, held_out: float, rng: random.Random
) -> list[dict[str, object]]:
    """Make the items from one file."""
    documents = _held_out_documents(file, held_out)
    places = [place for i, text in enumerate(documents) for place in _places(i, text)]
    items: list[dict[str, object]] = []
    for place in _in_turn(places, rng):
        answers = _wrong_choices(place, places, rng)[: choices - 1]
        if len(answers) == choices - 1:
            label = rng.randrange(choices)
            answers.insert(label, place.start + place.text)
            items.append({"context": place.context, "choices": answers, "label": label})
        if len(items) == wanted:
            return items
    raise UpcyclingError(
        f"{file}: its last {held_out:.3g} of documents, {len(documents)} of them, give "
        f"{len(items)} items with {choices} choices, expected {wanted}. Ask for fewer items or "
        "bring more text; a larger held_out takes text that may be trained on."
    )


def _held_out_documents(file: Path, share: float) -> list[str]:
    """Return the last documents; empty documents do not count, as in Megatron."""
    total = sum(1 for text, _ in read_documents(file) if text)
    documents = (text for text, _ in read_documents(file) if text)
    return list(islice(documents, total - int(total * share), None))


def _places(document: int, text: str) -> Iterator[_Place]:
    """Yield a document's candidate lines."""
    for match in _NEXT_LINE.finditer(text):
        place = _Place(document, _context(text, match.start()), match[1], match[2].rstrip())
        if len(place.context) >= MIN_CONTEXT and _is_informative(place.text):
            yield place


def _context(text: str, end: int) -> str:
    """Return the whole lines before a position, as many as fit into `MAX_CONTEXT`."""
    context = text[max(0, end - MAX_CONTEXT - 1) : end]
    if end > MAX_CONTEXT:
        context = context.partition("\n")[2]  # drop the truncated first line
    return context.lstrip("\n")


def _is_informative(line: str) -> bool:
    """Return whether a line has a suitable length and is mostly letters (no rule, no table)."""
    return MIN_LINE <= len(line) <= MAX_LINE and 2 * sum(map(str.isalpha, line)) >= len(line)


def _in_turn(places: Sequence[_Place], rng: random.Random) -> list[_Place]:
    """Return the places in random order, one per document before the second of any document."""
    turns: defaultdict[int, Iterator[int]] = defaultdict(count)
    mixed = rng.sample(places, len(places))
    return sorted(mixed, key=lambda place: next(turns[place.document]))


def _wrong_choices(place: _Place, places: Sequence[_Place], rng: random.Random) -> list[str]:
    """Return distinct lines of other documents, the most similar to the right line first."""
    pool = rng.sample(places, min(len(places), _POOL))
    others = [other for other in pool if other.document != place.document]
    different = {place.text: ""}
    for other in sorted(others, key=place.unlike):  # stable, so ties stay in random order
        different.setdefault(other.text, other.start + other.text)
    return list(different.values())[1:]


def _write_task(out: Path, name: str, items: Sequence[dict[str, object]]) -> None:
    """Write the items and lm-eval's description of the task; each file is written atomically."""
    import yaml

    mean = {"aggregation": "mean", "higher_is_better": True}
    pattern = glob.escape(str(out.resolve() / f"{name}.jsonl"))  # `datasets` expects a pattern
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": pattern}},
        "test_split": "test",
        "output_type": "multiple_choice",
        # Field names, not templates: lm-eval converts an all-digit result to a number.
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
        "metadata": {"version": 1.0},
    }
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
    contents = {"jsonl": "".join(lines), "yaml": yaml.safe_dump(task, sort_keys=False)}
    with scratch_directory(out, "choices") as temporary:
        for suffix, content in contents.items():
            (temporary / suffix).write_bytes(content.encode())
        for suffix in contents:
            os.replace(temporary / suffix, out / f"{name}.{suffix}")


def _check_arguments(
    files: Sequence[Path], name: str, items: int, choices: int, held_out: float
) -> None:
    """Check the arguments.

    Raises:
        UpcyclingError: An argument is out of range.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):  # the name becomes a file name
        raise UpcyclingError(f"name is {name!r}, expected letters, digits, `_`, `.` and `-`")
    if not 1 <= len(files) <= items or choices < 2 or not 0 < held_out <= 1:
        raise UpcyclingError(
            f"{len(files)} files, {items} items, {choices} choices, held_out {held_out}; expected "
            "at least 1 file, 1 item for each, 2 choices, and a share above 0 and at most 1"
        )

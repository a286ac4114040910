"""Makes a multiple-choice task for lm-eval of held-out text: which line comes next?"""

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
"""Characters of the context, and of a line without its indentation."""

# After a blank line something new begins, which nobody can guess. After white space at a line's
# end nothing is asked, because lm-eval would move it from the context to the choices.
_NEXT_LINE = re.compile(r"(?<=\S)(\n[^\S\n]*)(\S.*)")

# So many lines are looked at for the wrong choices of an item, however large the corpus is.
_POOL = 1000


class _Place(NamedTuple):
    """A line that may be asked for: what is before it, its line break and indentation, its text."""

    document: int
    context: str
    start: str
    text: str

    def unlike(self, other: _Place) -> tuple[bool, int]:
        """Tells how far length and indentation differ: lines that look alike sort first."""
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

    An item is `{"context": ..., "choices": [...], "label": ...}`: some whole lines of a document,
    the line that really follows among lines of the file's other documents, and its index. Wrong
    lines are as long as the right one within a factor of 2, and indented like it, where there are
    such. Context and right choice together are the document's own text. The files give as many
    items each, in turn, and so do their documents. The same arguments give the same items.

    The YAML names the JSONL by its absolute path, because lm-eval takes a relative one from the
    directory where it is started. Where the directory is moved, write the task again.

    Args:
        files: JSONL files, each line an object with a string under "text".
        out: Directory to write to; made when missing. An older task of this name is replaced.
        name: The task's name in lm-eval.
        items: Number of items.
        choices: Choices of an item, the right one included.
        seed: Decides on the places, the wrong choices and the labels.
        held_out: Share of each file's documents, from its end, that items are made of. At most
            0.03 is none that Megatron trains on with its split 970,20,10.

    Returns:
        The number of items.

    Raises:
        UpcyclingError: If an argument, a file or a line is bad, or a file has too few items.
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
    """Make the items of one file."""
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
    """Return the last documents, counted as Megatron does: it has none that are empty."""
    total = sum(1 for text, _ in read_documents(file) if text)
    documents = (text for text, _ in read_documents(file) if text)
    return list(islice(documents, total - int(total * share), None))


def _places(document: int, text: str) -> Iterator[_Place]:
    """Yield the lines of a document that may be asked for."""
    for match in _NEXT_LINE.finditer(text):
        place = _Place(document, _context(text, match.start()), match[1], match[2].rstrip())
        if len(place.context) >= MIN_CONTEXT and _is_informative(place.text):
            yield place


def _context(text: str, end: int) -> str:
    """Return the whole lines before this position, as many as fit."""
    context = text[max(0, end - MAX_CONTEXT - 1) : end]
    if end > MAX_CONTEXT:
        context = context.partition("\n")[2]  # its first line is cut
    return context.lstrip("\n")


def _is_informative(line: str) -> bool:
    """Tells whether a line is neither short nor long and mostly words: no rule, no table."""
    return MIN_LINE <= len(line) <= MAX_LINE and 2 * sum(map(str.isalpha, line)) >= len(line)


def _in_turn(places: Sequence[_Place], rng: random.Random) -> list[_Place]:
    """Return the places in random order, but with one of each document before a second."""
    turns: defaultdict[int, Iterator[int]] = defaultdict(count)
    mixed = rng.sample(places, len(places))
    return sorted(mixed, key=lambda place: next(turns[place.document]))


def _wrong_choices(place: _Place, places: Sequence[_Place], rng: random.Random) -> list[str]:
    """Return lines of other documents, all different, those most like the right one first."""
    pool = rng.sample(places, min(len(places), _POOL))
    others = [other for other in pool if other.document != place.document]
    different = {place.text: ""}
    for other in sorted(others, key=place.unlike):  # stable, so otherwise in random order
        different.setdefault(other.text, other.start + other.text)
    return list(different.values())[1:]


def _write_task(out: Path, name: str, items: Sequence[dict[str, object]]) -> None:
    """Write the items and lm-eval's description of the task; each appears whole."""
    import yaml

    mean = {"aggregation": "mean", "higher_is_better": True}
    pattern = glob.escape(str(out.resolve() / f"{name}.jsonl"))  # datasets takes no mere path
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": pattern}},
        "test_split": "test",
        "output_type": "multiple_choice",
        # The fields themselves: lm-eval makes a number of a template's text that is all digits.
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
    """Refuse what cannot be meant."""
    if not re.fullmatch(r"\w[\w.-]*", name):  # it becomes a file name
        raise UpcyclingError(f"name is {name!r}, expected letters, digits, `_`, `.` and `-`")
    if not 1 <= len(files) <= items or choices < 2 or not 0 < held_out <= 1:
        raise UpcyclingError(
            f"{len(files)} files, {items} items, {choices} choices, held_out {held_out}; expected "
            "at least 1 file, 1 item for each, 2 choices, and a share above 0 and at most 1"
        )

"""What is in an evaluation is found, and nothing else."""

from pathlib import Path

import pytest

from nemo_upcycle.data.decontamination import (
    EvaluationItems,
    Overlap,
    read_items,
)
from nemo_upcycle.errors import UpcyclingError
from tests.evaluation_items import ITEMS, LONG, PADDING, SHORT, TINY


@pytest.fixture
def items() -> EvaluationItems:
    return EvaluationItems(ITEMS)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (PADDING + LONG + PADDING, ("mmlu", 3)),
        (LONG.upper().replace(",", " --"), ("mmlu", 3)),
        (" ".join(LONG.split()[5:18]), ("mmlu", 3)),
        ("\n".join(SHORT.split()) + "?", ("piqa", 0)),
        (PADDING + SHORT, ("piqa", 0)),
    ],
)
def test_overlaps_are_found(items: EvaluationItems, text: str, found: tuple[str, int]) -> None:
    overlap = items.overlap(text)
    assert overlap is not None
    assert (overlap.task, overlap.number) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        PADDING,
        " ".join(LONG.split()[5:17]),  # twelve words
        SHORT.replace("eight", "nine"),
        " ".join(SHORT.split()[:-1]),
        TINY,  # too short to be told from chance
        " ".join(reversed(LONG.split())),
    ],
)
def test_clean_text_is_not_flagged(items: EvaluationItems, text: str) -> None:
    assert items.overlap(text) is None
    assert items.too_short == 1


def test_what_is_shared_is_said(items: EvaluationItems) -> None:
    assert items.overlap(SHORT) == Overlap("piqa", 0, SHORT.lower())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file .*items.jsonl; `nemo-upcycle data items` writes one"),
        ("", "no items in it"),
        ('{"task": "x"}\n', r"items\.jsonl:1: expected an object with task, number and text"),
        ("no json\n", r"items\.jsonl:1: expected an object"),
    ],
)
def test_bad_items_are_one_error(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "items.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UpcyclingError, match=message):
        read_items(path)

"""What is in an evaluation is found, and nothing else."""

import json
from pathlib import Path

import pytest

from nemo_upcycle.data.decontamination import EvaluationItems, Item, Overlap, read_items
from nemo_upcycle.data.manifest import read_manifest
from nemo_upcycle.data.preparation import Preparation, prepare
from nemo_upcycle.errors import UpcyclingError
from tests.unit.test_data_preparation import (
    documents_in,
    expected_documents,
    tokenizer,
    write,
)

__all__ = ["tokenizer"]  # a fixture

LONG = (
    "A router that sends every token to one expert leaves the others without a gradient, and so "
    "they stay copies of the dense layer."
)
SHORT = "Which layer is copied into all eight experts"
TINY = "What is two plus two?"
ITEMS = [Item("mmlu", 3, LONG), Item("piqa", 0, SHORT), Item("gsm8k", 1, TINY)]
PADDING = "Something else entirely, of which no evaluation has ever asked. " * 5


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


@pytest.mark.parametrize("workers", [1, 2])
def test_contaminated_documents_are_left_out_and_located(
    tokenizer: Path, tmp_path: Path, workers: int
) -> None:
    texts = [f"clean document number {n}" for n in range(30)]
    planted = {4: PADDING + LONG, 21: SHORT}
    for line, text in planted.items():
        texts[line] = text
    source = write(tmp_path / "a.jsonl", texts)
    evaluations = tmp_path / "items.jsonl"
    evaluations.write_text("".join(json.dumps(vars(item)) + "\n" for item in ITEMS))
    preparation = Preparation(
        (str(source),), tokenizer, tmp_path / "data", evaluations=evaluations, part_bytes=300
    )
    manifest = prepare(preparation, workers)
    assert (manifest.contaminated, manifest.documents) == (2, 28)
    clean = [text for line, text in enumerate(texts) if line not in planted]
    assert documents_in(tmp_path / "data") == expected_documents(tokenizer, clean)
    report = (tmp_path / "data.contaminated.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in report]
    assert [(each["line"], each["task"], each["number"]) for each in found] == [
        (5, "mmlu", 3),
        (22, "piqa", 0),
    ]
    assert found[1]["words"] == SHORT.lower()
    assert read_manifest(tmp_path / "data") == manifest


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

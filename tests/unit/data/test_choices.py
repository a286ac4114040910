"""The multiple-choice task: its items are right, and lm-eval reads them as they are written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.data.choices import MAX_CONTEXT, MIN_CONTEXT, write_choices
from nemo_upcycle.errors import UpcyclingError

DOCUMENTS = 200
LINES = 40
ANIMALS = ["badger", "cormorant", "dolphin", "elk", "ferret", "goose", "heron"]


def document(kind: str, number: int) -> str:
    """A text whose lines are all different, of several lengths and indentations."""
    lines = []
    for i in range(LINES):
        words = " ".join(ANIMALS[(i + k) % 7] for k in range(1 + i % 7))
        lines.append(f"{' ' * (i % 3)}{kind} {number} in line {i} has a {words}")
    return "\n".join(lines)


def write(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def read(out: Path, name: str = "next_line") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().split("\n")[:-1]]


def right(item: dict[str, Any]) -> str:
    return item["choices"][item["label"]]


def wrong(item: dict[str, Any]) -> list[str]:
    return [choice for i, choice in enumerate(item["choices"]) if i != item["label"]]


def origin(line: str) -> tuple[str, int]:
    """The kind and the number of the document that a line is from."""
    kind, number = line.split()[:2]
    return kind, int(number)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("corpus")
    return [
        write(root / f"{kind}.jsonl", [document(kind, i) for i in range(DOCUMENTS)])
        for kind in ("prose", "code")
    ]


@pytest.fixture(scope="module")
def items(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("task")
    assert write_choices(files, out, items=301) == 301
    assert sorted(path.name for path in out.iterdir()) == ["next_line.jsonl", "next_line.yaml"]
    items = read(out)
    assert len(items) == 301
    return items


def test_context_and_right_choice_are_the_document(items: list[dict[str, Any]]) -> None:
    for item in items:
        assert set(item) == {"context", "choices", "label"}
        text = f"\n{document(*origin(right(item)))}\n"
        assert f"\n{item['context']}{right(item)}\n" in text, "whole lines"
        assert MIN_CONTEXT <= len(item["context"]) <= MAX_CONTEXT
        assert item["context"] == item["context"].rstrip()
    longest = max(len(line) for line in document("prose", 199).split("\n"))
    assert max(len(item["context"]) for item in items) > MAX_CONTEXT - longest


def test_contexts_are_as_long_as_they_may_be(tmp_path: Path) -> None:
    lines = [letter * 79 for letter in "abcdefghij"]
    lines[1] += "b"  # five lines with this one are 400 characters, without it 399
    upper = [line.upper() for line in lines]
    upper[1] += "B"  # and here 401
    texts = ["\n".join(lines), "\n".join(upper)]
    write_choices([write(tmp_path / "x.jsonl", texts)], tmp_path, items=16, held_out=1)
    contexts = {right(item): item["context"] for item in read(tmp_path)}
    for line, context in ((4, lines[:4]), (5, lines[:5]), (6, lines[1:6]), (7, lines[2:7])):
        assert contexts["\n" + lines[line]] == "\n".join(context)
    for line, context in ((5, upper[1:5]), (6, upper[2:6]), (7, upper[2:7])):
        assert contexts["\n" + upper[line]] == "\n".join(context)


def test_wrong_choices_are_like_the_right_one_and_from_elsewhere(
    items: list[dict[str, Any]],
) -> None:
    for item in items:
        kind, number = origin(right(item))
        assert len({choice.strip() for choice in item["choices"]}) == 4
        for choice in wrong(item):
            assert choice[0] == "\n" and "\n" not in choice[1:]
            assert origin(choice)[0] == kind
            assert origin(choice)[1] != number
            assert choice.index(kind) == right(item).index(kind), "the same indentation"
            assert 0.5 <= len(choice.strip()) / len(right(item).strip()) <= 2


def test_a_line_that_other_documents_have_too_is_no_wrong_choice(tmp_path: Path) -> None:
    common = "this line is in all of the documents"
    texts = [f"{document('prose', i)}\n {common}\n   {common}" for i in range(5)]
    write_choices([write(tmp_path / "x.jsonl", texts)], tmp_path, items=100, held_out=1)
    items = read(tmp_path)
    assert any(common in right(item) for item in items)
    for item in items:
        assert len({choice.strip() for choice in item["choices"]}) == 4


def test_labels_are_spread(items: list[dict[str, Any]]) -> None:
    counts = Counter(item["label"] for item in items)
    assert sorted(counts) == [0, 1, 2, 3]
    assert min(counts.values()) > 50


def test_files_and_documents_take_turns(items: list[dict[str, Any]]) -> None:
    origins = [origin(right(item)) for item in items]
    assert [kind for kind, _ in origins] == (["prose", "code"] * 151)[:301]
    counts = Counter(origins)
    assert len(counts) == 12  # 3 % of 200, twice
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len({right(item) for item in items}) == len(items), "nothing is asked twice"


@pytest.mark.parametrize("documents", [67, 99, 110, 150, 200])
def test_nothing_is_from_what_megatron_trains_on(tmp_path: Path, documents: int) -> None:
    # Megatron's dataset has no empty documents, so that they do not count.
    texts = [*[""] * 50, *(document("prose", i) for i in range(documents)), *[""] * 50]
    file = write(tmp_path / "x.jsonl", texts)
    write_choices([file], tmp_path, items=20)
    used = {origin(choice)[1] for item in read(tmp_path) for choice in item["choices"]}
    trained = round(0.97 * documents)  # as BlendedMegatronDatasetBuilder counts
    assert used <= set(range(trained, documents))
    assert documents - 1 in used
    write_choices([file], tmp_path, items=200, held_out=0.5)
    used = {origin(choice)[1] for item in read(tmp_path) for choice in item["choices"]}
    assert used == set(range(documents - documents // 2, documents))


def test_the_same_seed_gives_the_same_bytes(files: list[Path], tmp_path: Path) -> None:
    contents = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        write_choices(files, tmp_path, name, items=50, seed=seed)
        contents.append((tmp_path / f"{name}.jsonl").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_only_informative_lines_after_text_are_used(tmp_path: Path) -> None:
    odd = [
        "too short a line",
        "words " * 30,
        "=" * 60,
        "| 0x10, 0x20, 0x30, 0x40 | hex |",
        "",
        "this line is after a blank line",
        "this line ends with a space ",
        "this line is after a line that ends with a space",
    ]
    texts = [
        "\n".join(["", "too near to the beginning of all", document("prose", i), *odd, "the end"])
        for i in range(8)
    ]
    file = write(tmp_path / "x.jsonl", texts)
    # The first two lines have too little before them, and of the odd ones one is as it should be.
    everything = 8 * (LINES - 2 + 1)
    with pytest.raises(UpcyclingError, match=rf"8 of them, give {everything} items .* 400"):
        write_choices([file], tmp_path, items=400, held_out=1)
    write_choices([file], tmp_path, items=everything, held_out=1)
    items = read(tmp_path)
    seen = {choice.lstrip() for item in items for choice in item["choices"]}
    assert {line for line in seen if not line.startswith("prose")} == {odd[6].rstrip()}
    assert all(item["context"][0] != "\n" for item in items)


def test_number_of_choices(files: list[Path], tmp_path: Path) -> None:
    write_choices(files, tmp_path, items=20, choices=2)
    items = read(tmp_path)
    assert {len(item["choices"]) for item in items} == {2}
    assert {item["label"] for item in items} == {0, 1}


def test_too_little_text_is_an_error_and_the_old_task_stays(
    files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_choices(files, out, items=20)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    small = write(tmp_path / "small.jsonl", [document("small", i) for i in range(70)])
    with pytest.raises(UpcyclingError, match=r"small\.jsonl: .* 0\.03 .* 2 of .* 200.*fewer items"):
        write_choices([files[0], small], out, items=400)
    one = write(tmp_path / "one.jsonl", [document("one", 0)])
    with pytest.raises(UpcyclingError, match="0 of them, give 0 items"):
        write_choices([one], out, items=1)
    with pytest.raises(UpcyclingError, match="1 of them, give 0 items"):  # no other document
        write_choices([one], out, items=1, held_out=1)
    with pytest.raises(UpcyclingError, match="give 0 items with 60 choices"):
        write_choices([small], out, items=1, choices=60)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"txet": "b"}\n')
    with pytest.raises(UpcyclingError, match=r"bad\.jsonl:2: "):
        write_choices([files[0], bad], out, items=20)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_interrupted_write_leaves_the_old_task(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*paths: Path) -> None:
        raise OSError

    write_choices(files, tmp_path, items=20)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError):
        write_choices(files, tmp_path, items=30)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"files": []}, "0 files"),
        ({"items": 1}, "1 item for each"),
        ({"choices": 1}, "1 choices"),
        ({"held_out": 0.0}, "held_out 0.0"),
        ({"held_out": 3}, "held_out 3"),
        ({"name": "../next_line"}, "name is '../next_line'"),
    ],
)
def test_bad_arguments(
    files: list[Path], tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UpcyclingError, match=message):
        write_choices(**{"files": files, "out": tmp_path / "out", "items": 9, **arguments})
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
def test_lm_eval_asks_what_is_written(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Knowing(LM):
        """Knows the documents by heart, and prefers their opposite where `sign` is -1."""

        def __init__(self, sign: int) -> None:
            super().__init__()
            self.sign = sign
            self.texts = [document(k, i) for k in ("prose", "code") for i in range(DOCUMENTS)]

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            found = [any("".join(r.args) in text for text in self.texts) for r in requests]
            return [(self.sign * (100.0 if known else -100.0), known) for known in found]

        loglikelihood_rolling = generate_until = None

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    out = Path("a[1] *ü")  # lm-eval is started elsewhere, and datasets takes paths as patterns
    write_choices(files, out, "mine", items=20)
    manager = TaskManager(include_path=str(tmp_path / out), include_defaults=False)
    monkeypatch.chdir("/")
    for sign, expected in ((1, 1.0), (-1, 0.0)):
        evaluation = lm_eval.simple_evaluate(
            model=Knowing(sign), tasks=["mine"], task_manager=manager, bootstrap_iters=0
        )
        result = evaluation["results"]["mine"]
        assert (result["acc,none"], result["acc_norm,none"]) == (expected, expected)
        assert evaluation["n-samples"]["mine"]["effective"] == 20

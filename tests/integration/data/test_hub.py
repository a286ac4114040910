"""The academic part of the blend, from directories as the hub has them, with its whole schemas."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest
import yaml

from nemo_upcycle.data.blend import BlendedDataset, read_blend
from nemo_upcycle.data.documents import parts_of, read_part
from nemo_upcycle.data.preparation import Preparation, prepare
from nemo_upcycle.data.sources import HUB
from nemo_upcycle.errors import UpcyclingError
from tests.corpora import documents_in, expected_documents

ACADEMIC = {each.name: each for each in read_blend("llama3_moe").datasets[1:]}

STRING = {"dtype": "string"}
STRINGS = {"sequence": "string"}
LABELLED = {"sequence": [{"name": "text", **STRING}, {"name": "label", **STRING}]}


def classes(*names: str) -> dict[str, Any]:
    return {"dtype": {"class_label": {"names": {str(n): name for n, name in enumerate(names)}}}}


@dataclass(frozen=True)
class Card:
    """What the hub has of a data set.

    Attributes:
        features: As its card says them.
        record: One of its records.
        text: What the blend makes of it.
    """

    features: dict[str, dict[str, Any]]
    record: dict[str, Any]
    text: str


ARC = Card(
    {"id": STRING, "question": STRING, "choices": LABELLED, "answerKey": STRING},
    {
        "id": "MCAS_8",
        "question": "Which is warm?",
        # Some have numbers for letters.
        "choices": {"text": ["the sun", "the moon"], "label": ["1", "2"]},
        "answerKey": "1",
    },
    "Question: Which is warm?\nAnswer: the sun",
)

CARDS = {
    "mmlu_auxiliary_train": Card(
        {
            "question": STRING,
            "subject": STRING,
            "choices": STRINGS,
            "answer": classes("A", "B", "C", "D"),
        },
        {"question": "Q?", "subject": "", "choices": ["w", "x", "y", "z"], "answer": 2},
        "Q?\nA. w\nB. x\nC. y\nD. z\nAnswer: C. y",
    ),
    "boolq": Card(
        {"question": STRING, "answer": {"dtype": "bool"}, "passage": STRING},
        {"question": "is ice cold", "answer": True, "passage": "Ice is cold."},
        "Ice is cold.\nQuestion: is ice cold?\nAnswer: yes",
    ),
    "piqa": Card(
        {"goal": STRING, "sol1": STRING, "sol2": STRING, "label": {"dtype": "int64"}},
        {"goal": "To boil eggs", "sol1": "use no water.", "sol2": "use water.", "label": 1},
        "Question: To boil eggs\nAnswer: use water.",
    ),
    "sciq": Card(
        {
            "question": STRING,
            "distractor3": STRING,
            "distractor1": STRING,
            "distractor2": STRING,
            "correct_answer": STRING,
            "support": STRING,
        },
        {
            "question": "What do plants take?",
            "distractor3": "a",
            "distractor1": "b",
            "distractor2": "c",
            "correct_answer": "light",
            "support": "Plants take light.",
        },
        "Plants take light.\nQuestion: What do plants take?\nAnswer: light",
    ),
    "openbookqa": Card(
        {"id": STRING, "question_stem": STRING, "choices": LABELLED, "answerKey": STRING},
        {
            "id": "7-980",
            "question_stem": "The sun is a",
            "choices": {"text": ["moon", "star"], "label": ["A", "B"]},
            "answerKey": "B",
        },
        "The sun is a star",
    ),
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "hellaswag": Card(
        {
            "ind": {"dtype": "int32"},
            "activity_label": STRING,
            "ctx_a": STRING,
            "ctx_b": STRING,
            "ctx": STRING,
            "endings": STRINGS,
            "source_id": STRING,
            "split": STRING,
            "split_type": STRING,
            "label": STRING,
        },
        {
            "ind": 4,
            "activity_label": "Sitting",
            "ctx_a": "A man is tired.",
            "ctx_b": "he",
            "ctx": "A man is tired. he",
            "endings": ["runs.", "sits.", "flies.", "sings."],
            "source_id": "activitynet~v_x",
            "split": "train",
            "split_type": "indomain",
            "label": "1",
        },
        "A man is tired. he sits.",
    ),
    "commonsense_qa": Card(
        {
            "id": STRING,
            "question": STRING,
            "question_concept": STRING,
            "choices": {"sequence": LABELLED["sequence"][::-1]},
            "answerKey": STRING,
        },
        {
            "id": "1",
            "question": "Where is a fox?",
            "question_concept": "fox",
            "choices": {"label": ["A", "B"], "text": ["a tree", "a forest"]},
            "answerKey": "B",
        },
        "Question: Where is a fox?\nAnswer: a forest",
    ),
    "gsm8k": Card(
        {"question": STRING, "answer": STRING},
        {"question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
        "Question: 2 + 2?\nAnswer: 2 + 2 = <<2+2=4>>4\n#### 4",
    ),
}


def local(dataset: BlendedDataset, card: Card, root: Path, records: int = 1) -> str:
    """Write a data set as the hub has it, two configs of two splits; return its source here."""
    import pyarrow
    from pyarrow.parquet import write_table

    (source,) = dataset.sources
    name, _, query = source.removeprefix(HUB).partition("?")
    options = {"config": "default", "split": "train"} | dict(parse_qsl(query))
    directory = root / name
    configs = []
    for config in (options["config"], "other"):
        for split in (options["split"], "validation"):
            path = directory / config / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            wanted = (config, split) == (options["config"], options["split"])
            rows = [card.record] * records if wanted else [card.record] * 7
            write_table(pyarrow.Table.from_pylist(rows), path)
        files = [{"split": split, "path": f"{config}/{split}-*"}
                 for split in (options["split"], "validation")]  # fmt: skip
        configs.append({"config_name": config, "data_files": files})
    features = [{"name": key, **feature} for key, feature in card.features.items()]
    info = [{"config_name": each["config_name"], "features": features} for each in configs]
    said = yaml.safe_dump({"configs": configs, "dataset_info": info})
    (directory / "README.md").write_text(f"---\n{said}---\n")
    return source.replace(name, str(directory))


def test_each_data_set_has_its_card() -> None:
    assert ACADEMIC.keys() == CARDS.keys()


@pytest.mark.parametrize("name", list(CARDS))
def test_records_become_what_the_blend_says(tokenizer: Path, tmp_path: Path, name: str) -> None:
    dataset, card = ACADEMIC[name], CARDS[name]
    source = local(dataset, card, tmp_path / "hub", records=3)
    texts = [d.text for part in parts_of(source, 1) for d in read_part(part, dataset.selection)]
    assert texts == [card.text] * 3
    preparation = Preparation((source,), tokenizer, tmp_path / "data", dataset.selection)
    assert prepare(preparation).documents == 3
    assert documents_in(tmp_path / "data") == expected_documents(tokenizer, [card.text] * 3)


@pytest.mark.parametrize("name", list(CARDS))
def test_other_records_are_malformed(name: str) -> None:
    text, error = ACADEMIC[name].selection.of({})
    assert text is None
    assert error is not None
    assert "the template does not fit: UndefinedError" in error


@pytest.mark.parametrize("option", ["config=nope", "split=nope"])
def test_what_is_not_there_is_named(tmp_path: Path, option: str) -> None:
    source = local(ACADEMIC["boolq"], CARDS["boolq"], tmp_path)
    extra = "" if "config" in option else "config=default&"
    with pytest.raises(UpcyclingError, match=r"boolq.* cannot be opened: .*hf download"):
        parts_of(f"{source}?{extra}{option}", 1)

"""A blend's YAML: sources, prompt formats, weights; and what the recipes make of it."""

from pathlib import Path

import pytest

from nemo_upcycle.data.blend import read_blend, shipped
from nemo_upcycle.data.selection import Selection
from nemo_upcycle.errors import UpcyclingError
from tests.blends import BLEND


def test_weights_and_places(blend: Path) -> None:
    found = read_blend(str(blend)).datasets
    assert [each.name for each in found] == ["redpajama_v2", "boolq", "openbookqa"]
    assert [each.weight for each in found] == pytest.approx([0.7, 0.2, 0.1])
    assert found[0].prefix == blend.parent / "prepared" / "redpajama_v2"
    assert found[0].sources == (str(blend.parent / "crawl"),)
    assert found[0].selection == Selection("raw_content", {"bucket": "head"}, None)


def test_the_papers_blend_is_7_to_3() -> None:
    assert shipped() == ["llama3_moe"]
    found = read_blend("llama3_moe").datasets
    assert sum(each.weight for each in found) == pytest.approx(1)
    (web,) = (each for each in found if each.name == "redpajama_v2")
    assert web.weight == pytest.approx(0.7)
    assert web.selection.where == {"bucket": "head", "language": "en"}
    assert len(found) > 8
    academic = {each.name: each.weight for each in found[1:]}
    assert sum(academic.values()) == pytest.approx(0.3)
    # By their sizes: else the smallest would be read tens of thousands of times.
    assert academic["mmlu_auxiliary_train"] > 100 * academic["arc_challenge"]


def test_templates_run_no_code() -> None:
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    text, error = Selection(template=template).of({})
    assert text is None
    assert error is not None
    assert "SecurityError" in error


OTHER_DATA = """
base: llama3_moe
groups:
  web:
    weight: 1
    datasets:
      redpajama_v2:
        sources: [crawl, "redpajama-v2://mirror?snapshots=2023-06", "hf://a/b", "https://h/c.jsonl"]
"""


def test_a_blend_says_what_differs_from_the_papers(tmp_path: Path) -> None:
    (tmp_path / "blend.yaml").write_text(OTHER_DATA)
    papers, other = read_blend("llama3_moe"), read_blend(str(tmp_path / "blend.yaml"))
    assert other.datasets[0].weight == pytest.approx(0.25)
    assert other.datasets[0].selection == papers.datasets[0].selection
    assert other.datasets[0].sources == (
        f"{tmp_path}/crawl",
        f"redpajama-v2://{tmp_path}/mirror?snapshots=2023-06",
        "hf://a/b",
        "https://h/c.jsonl",
    )
    for theirs, ours in zip(papers.datasets[1:], other.datasets[1:], strict=True):
        assert (ours.name, ours.sources) == (theirs.name, theirs.sources)
        assert ours.prefix == tmp_path / theirs.prefix


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: nope", "base is 'nope'; expected one of: llama3_moe"),
        (BLEND.replace("weight: 7", "weight: 0"), "weights must be more than 0"),
        (BLEND.replace("sources: [crawl]", "sources: []"), "redpajama_v2: no sources"),
        (BLEND.replace("text_key", "textkey"), "Key 'textkey' not in 'DatasetSettings'"),
        (BLEND.replace("openbookqa:", "redpajama_v2:"), "names differ"),
        ("directory: x", "expected groups with datasets"),
        ("a: [1", "while parsing"),
    ],
)
def test_bad_blends_are_one_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UpcyclingError, match=message):
        read_blend(str(tmp_path / "bad.yaml"))


def test_an_unknown_blend_names_those_that_are() -> None:
    with pytest.raises(UpcyclingError, match=r"There is no blend 'nope'; .*one of: llama3_moe"):
        read_blend("nope")

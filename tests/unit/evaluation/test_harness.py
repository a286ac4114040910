"""Scores that are not lost, and earlier results of other questions."""

import json
import re
import tempfile
from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcyclingError


def test_scores_that_cannot_be_written_are_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from nemo_upcycle.evaluation.harness import Written

    (tmp_path / "file").write_text("")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    written = Written(tmp_path / "file" / "out")
    written.text("scores.md", "0.5")
    (found,) = (tmp_path / "scratch").rglob("scores.md")
    assert found.read_text() == "0.5"
    assert written.files == [found]
    with pytest.raises(UpcyclingError, match=f"could not be written .*it is in {found.parent}"):
        written.check()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    written.text("results.json", '{"acc": 0.25}')
    assert '{"acc": 0.25}' in capsys.readouterr().out
    with pytest.raises(UpcyclingError, match="it is printed above"):
        written.check()


EARLIER = {
    "results": {"t": {"acc,none": 0.5}},
    "n-shot": {"t": 0},
    "versions": {"t": 1},
    "n-samples": {"t": {"original": 60, "effective": 60}},
    "config": {"limit": None, "apply_chat_template": False, "tokenizer": "a" * 64},
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"config": {"limit": 4}}, "results with --limit 4, and now it is None"),
        ({"config": {"apply_chat_template": True}}, "--apply-chat-template True, and now"),
        ({"config": {}, "chat_template": "{{ x }}"}, "--apply-chat-template True, and now"),
        ({"n-samples": {"t": {"effective": 4}}}, "questions of t 4, and now it is 60"),
        ({"versions": {"t": 2}}, "version of t 2, and now it is 1"),
        ({"n-shot": {"t": 5}}, "shots of t 5, and now it is 0"),
        ({"config": {"tokenizer": "b" * 64}}, "tokenizer bbbbbbbbbbbbbbbb, and now it is aaaa"),
        ({"results": {"t": {"alias": "t"}}}, "has no score of t"),
    ],
)
def test_earlier_results_of_other_questions_are_refused(
    tmp_path: Path, changed: dict, message: str
) -> None:
    from nemo_upcycle.evaluation.harness import Options, check_alike, check_options, read_results
    from nemo_upcycle.evaluation.tasks import Request

    path, request = tmp_path / "dense.json", Request(("t",), None)

    def check(earlier: dict) -> None:
        path.write_text(json.dumps(earlier))
        found = read_results(path, [request])
        check_options(path, found, Options())
        check_alike(path, found, {request: EARLIER})

    check(EARLIER)
    with pytest.raises(UpcyclingError, match=re.escape(message)):
        check(EARLIER | changed)

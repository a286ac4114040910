"""Which field of a record is the text."""

from typing import Any

import pytest

from nemo_upcycle.data.selection import Selection


@pytest.mark.parametrize(
    ("record", "key", "message"),
    [
        ({"content": "a", "id": 1}, "text", 'there is "content", "id": say which with --text-key'),
        ({}, "text", "there is nothing"),
        ({"text": {"body": "a"}}, "text", 'found dict with "body": a nested one is OUTER.INNER'),
        ({"text": b"a"}, "text", "found bytes: a column without the type of a string; cast it"),
        ({"text": None}, "text", "found NoneType: say another with --text-key"),
        ({"a": {"b": 1}}, "a.b", 'expected a string under "a.b", found int'),
        ({"a": {"c": "x"}}, "a.b", 'expected a string under "a.b", there is "a"'),
    ],
)
def test_a_field_that_is_no_text_is_named(record: dict[str, Any], key: str, message: str) -> None:
    text, error = Selection(key).of(record)
    assert text is None
    assert message in str(error)

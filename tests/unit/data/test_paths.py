"""`data_paths`: what is meant is found, and what is not is named."""

from pathlib import Path

import pytest

from nemo_upcycle.data.paths import parse, text_of, words_of
from nemo_upcycle.errors import UpcyclingError

pytestmark = pytest.mark.usefixtures("home")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/a", ["/a"]),
        (" /a  /b ", ["/a", "/b"]),
        ("0.7 /a 0.3 /b", ["0.7", "/a", "0.3", "/b"]),
        ("30 /a 7e1 /b", ["30.0", "/a", "70.0", "/b"]),
        ("1 '/x y/a' 2 \"/x y/b\" 3 /x\\ y/c", ["1.0", "/x y/a", "2.0", "/x y/b", "3.0", "/x y/c"]),
        ("my data/web", ["my data/web"]),
        ("my data/two words.idx", ["my data/two words"]),
        (
            "0.7 my data/web 0.3 my data/two words",
            ["0.7", "my data/web", "0.3", "my data/two words"],
        ),
        ("my data/web web", ["my data/web", "web"]),
        ("web.bin", ["web"]),
        ("/a.idx", ["/a"]),
        ("ends.bin", ["ends.bin"]),
        ("~/web", ["HOME/web"]),
        ("'~/my data/web.bin'", ["HOME/my data/web"]),
        ("msc://store/web", ["msc://store/web"]),
    ],
)
def test_what_is_meant(text: str, words: list[str], home: Path) -> None:
    assert words_of(parse(text)) == [word.replace("HOME", str(home)) for word in words]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 /a 1 /b", "the weight of /a is 0; expected more than 0"),
        ("1 /a -0.5 /b", "the weight of /b is -0.5; expected more than 0"),
        ("nan /a", "the weight of /a is nan"),
        ("1 /a inf /b", "the weight of /b is inf"),
        ("0.7 /a /b", "/b has no weight before it"),
        ("/a 0.3 /b", "/a has no weight, and others have"),
        ("0.7 /a 0.3", "no prefix after the weight 0.3"),
        ("0.7 0.3 /a", "no prefix after the weight 0.7"),
        ("0.7 /no such/a 0.3 /b", "is put in quotes"),
        ("", "data_paths is empty"),
        ("'/a", "No closing quotation"),
    ],
)
def test_what_is_not_is_named(text: str, message: str) -> None:
    with pytest.raises(UpcyclingError, match=message):
        parse(text)


def test_written_and_read_again() -> None:
    paths = parse("0.7 '/it'\"'\"'s/a b' 0.123456789 /c")
    assert parse(text_of(paths)) == paths
    assert paths[0].prefix == "/it's/a b"

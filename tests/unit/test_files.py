"""Files that are there whole or not at all."""

from pathlib import Path

import pytest

from nemo_upcycle.files import write_whole


@pytest.mark.parametrize("there", [True, False])
def test_a_failure_leaves_no_directory_that_it_made(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "a" / "b"
    if there:
        out.mkdir(parents=True)
    with pytest.raises(OSError, match="File name too long"):
        write_whole(out / ("x" * 300), "x")
    assert out.exists() == there
    assert (tmp_path / "a").exists() == there

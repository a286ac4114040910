"""Groups are those of Megatron's own generator, for the paper's mappings and odd ones."""

from pathlib import Path

import pytest
from nemo_upcycle_recipes.numbers import LLAMA3_8B_E8T2
from typer.testing import CliRunner

from nemo_upcycle.cli import app
from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.plans.groups import rank_groups
from nemo_upcycle.plans.groups_report import colors_of, drawn_nodes


def test_what_stays_inside_a_node() -> None:
    """The paper's point: with folding, experts' all-to-all stays on NVLink."""
    found = rank_groups(LLAMA3_8B_E8T2.folding, 512)
    assert found["EP"].size == 8
    assert found["EP"].nodes(8) == found["TP"].nodes(8) == found["CP"].nodes(8) == 1
    assert found["PP"].nodes(8) == 4
    assert found["EP"].of_rank(9) == tuple(range(8, 16))


def test_the_command_shows_and_draws_them(tmp_path: Path) -> None:
    picture = tmp_path / "new" / "groups.png"
    result = CliRunner().invoke(
        app, ["groups", "--world-size", "128", "--out", str(picture)], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    (row,) = (line for line in result.output.splitlines() if "× EP " in line)
    assert [cell.strip() for cell in row.strip("│").split("│")][:4] == [
        "16 × EP",
        "8",
        "0–7",
        "inside a node",
    ]
    assert picture.stat().st_size > 20_000


@pytest.mark.parametrize(
    ("world_size", "nodes"),
    [
        (64, list(range(8))),
        (128, list(range(16))),
        (512, [*range(4), *range(16, 20), *range(32, 36), *range(48, 52)]),
        (100, list(range(13))),
    ],
)
def test_a_large_picture_shows_every_stage(world_size: int, nodes: list[int]) -> None:
    assert drawn_nodes(LLAMA3_8B_E8T2.folding, world_size, 8) == nodes


def test_more_stages_than_there_is_room_for() -> None:
    assert drawn_nodes(ParallelFolding.of(pp=32), 512, 8) == list(range(0, 32, 2))


def test_a_world_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UpcyclingError, match="do not divide"):
        rank_groups(LLAMA3_8B_E8T2.folding, 100)


@pytest.mark.parametrize("number", [1, 2, 20, 32, 128, 500])
def test_no_two_parts_have_the_same_color(number: int) -> None:
    shown = {tuple(round(255 * part) for part in color) for color in colors_of(number)}
    assert len(shown) == number

"""The tables of docs/families.md are what the package says, and each cell has its test."""

import pytest

from nemo_upcycle.families import FAMILIES
from nemo_upcycle.families.moe_config import MOE_FAMILIES
from tests import tiny
from tests.distributed.config_draws import FAMILIES as DRAWN
from tests.distributed.trained import KINDS, NOT_EXPORTED
from tests.families_page import export_of, with_tables
from tests.readme.documents import text


def test_the_tables_are_what_the_package_says() -> None:
    page = text("docs/families.md")
    assert with_tables(page) == page, "python -m tests.families_page docs/families.md writes it"


def kind(name: str) -> str:
    return name.partition(",")[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_cell_of_a_family_has_its_test(family: str) -> None:
    """A tiny model, random configs, and an export or its refusal."""
    assert family in map(kind, tiny.FAMILIES)
    assert family in DRAWN
    exported = export_of(family)
    if exported.startswith("none"):
        assert family in {kind(dense) for dense, _, _ in NOT_EXPORTED.values()}
    else:
        kinds = {(moe, kind(dense)) for moe, dense, _, _ in KINDS.values()}
        classes = {MOE_FAMILIES[moe].class_name: moe for moe, _ in kinds}
        assert (classes[exported], family) in kinds


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_each_moe_has_its_test(family: str) -> None:
    assert family in {moe for moe, *_ in KINDS.values()}
    assert family in DRAWN

"""What the documents say of files and numbers is so."""

import hashlib
import re
from pathlib import Path

import pytest
import yaml
from nemo_upcycle_recipes.expectations import with_table

import nemo_upcycle
from nemo_upcycle.ablations.studies import STUDIES, arms_of
from tests.distributed.foldings import FOLDINGS
from tests.readme.documents import PAGES, ROOT, anchors, code, links, text

LICENSE_SHA256 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
"""Of https://www.apache.org/licenses/LICENSE-2.0.txt."""


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    for link in links(page):
        target, _, anchor = link.partition("#")
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        name = str(path.relative_to(ROOT))
        assert path.exists(), link
        assert not anchor or anchor in anchors(name), link


def test_no_module_of_tests_imports_from_another() -> None:
    """What several modules use is in modules without `test_`, as CONTRIBUTING.md says."""
    imports = re.compile(r"^ *from tests[\w.]*(?:\.test_\w+ import| import test_).*", re.MULTILINE)
    found = {path: imports.findall(path.read_text()) for path in ROOT.glob("tests/**/*.py")}
    assert not {path: lines for path, lines in found.items() if lines}


def test_the_readme_is_short() -> None:
    assert len(text("README.md").splitlines()) <= 170


def test_the_readme_links_to_every_page() -> None:
    linked = {link.partition("#")[0] for link in links("README.md")}
    assert {page for page in PAGES if page.startswith("docs/")} <= linked


def test_the_table_of_recipes_is_what_the_planner_says() -> None:
    page = text("docs/running.md")
    anew = "python -m nemo_upcycle_recipes.expectations docs/running.md writes it"
    assert with_table(page) == page, anew


def test_numbers_of_tests_and_arms() -> None:
    assert f"{len(FOLDINGS)} parallel mappings" in text("README.md")
    assert f"Over {len(FOLDINGS)} mappings, tests show" in text("README.md")
    assert f"{len(arms_of(list(STUDIES.values())))} arms" in text("docs/ways-of-upcycling.md")


def test_versions_are_those_of_the_package() -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    versions = dict(re.findall(r"^([\w.-]+)==([\w.]+)", constraints, flags=re.MULTILINE))
    readme = text("README.md")
    for name in ("nemo-toolkit", "megatron-core"):
        assert f"{versions[name]}" in readme, name
    for name, label in (("nemo_run", "nemo-run "), ("transformers", "transformers | ")):
        assert label + versions[name].rpartition(".")[0] in readme, name
    assert f"tested: {versions['torch'].rpartition('.')[0]} on CPU" in readme


def test_tree_names_files_that_exist() -> None:
    (tree,) = (block for block in code("CONTRIBUTING.md") if block.startswith("nemo_upcycle/"))
    folder, named = Path(), set()
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = Path(name)
            path = ROOT / name
        else:
            path = ROOT / folder / name
            named.add(name.strip("/"))
        assert path.exists(), path
    packages = {path.parent.name for path in (ROOT / "nemo_upcycle").glob("*/__init__.py")}
    assert packages <= named


def test_the_license_is_the_unmodified_text() -> None:
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == LICENSE_SHA256


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == nemo_upcycle.__version__
    assert citation["authors"] == [{"name": "The nemo-upcycle authors"}]
    assert citation["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert "2412.09952" in paper["url"]
    assert f"{nemo_upcycle.__version__}" in text("CHANGELOG.md")

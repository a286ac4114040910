"""README.md and docs/, taken apart: prose, links, commands and other code."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
CPU2 = "run.executor=cpu run.executor.ntasks_per_node=2"


@dataclass(frozen=True)
class Command:
    """A shell command of a document."""

    page: str
    line: str

    @property
    def words(self) -> list[str]:
        """The command as a shell gives it to a program."""
        return shlex.split(self.line.replace("$CPU2", CPU2), comments=True)

    def __str__(self) -> str:
        return f"{self.page}: {self.line[:70]}"


def text(page: str) -> str:
    """Return a document."""
    return (ROOT / page).read_text()


def code(page: str, language: str = "") -> list[str]:
    """Return the blocks of code of a language in a document; by default those of none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text(page), flags=re.DOTALL | re.MULTILINE)
    return [block for kind, block in found if kind == language]


def prose(page: str) -> str:
    """Return a document without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text(page), flags=re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[Command]:
    """Return the shell commands of a document, one a line."""
    lines = "\n".join(code(page, "bash")).replace("\\\n", " ").splitlines()
    return [
        Command(page, line)
        for line in lines
        if line.strip() and not line.startswith(("#", "CPU2="))
    ]


def anchors(page: str) -> set[str]:
    """Return what links into a document may name, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: str) -> list[str]:
    """Return the targets of a document's links and pictures that are files of this repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in targets if "://" not in target]

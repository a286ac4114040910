"""Run the notebooks of `examples/` as a reader would, and store what they show.

    python -m tests.end_to_end.notebooks [NUMBER …]

executes them one after another in an empty directory and writes them back with their outputs.
"""

import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.end_to_end import cli

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
TIMEOUT_S = 3600
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
"""All that a stored notebook says of where it ran: nothing."""

_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_OVERWRITTEN = re.compile(r"^.*\r|[^\S\n]+$", re.MULTILINE)
_SHOWS = re.compile(r"^\s*(print|plt\.show|Image|Markdown|show)\(", re.MULTILINE)
_OF_A_MACHINE = re.compile(r"(?<![\w.~/])/(?:home|opt|private|root|tmp|usr|Users|work)/\S*")


def execute(notebook: NotebookNode, directory: Path) -> NotebookNode:
    """Execute a notebook from top to bottom, in a kernel of this environment.

    Args:
        notebook: The notebook; its old outputs are dropped.
        directory: Where its kernel starts; NeMo-Run's home is beside it.

    Returns:
        The notebook with outputs, as it is stored.

    Raises:
        CellExecutionError: A cell has failed.
    """
    executed = nbformat.from_dict(notebook)
    directory.mkdir(parents=True, exist_ok=True)
    client = NotebookClient(
        executed,
        timeout=TIMEOUT_S,
        startup_timeout=TIMEOUT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(directory)}},
        record_timing=False,
    )
    client.execute(
        env={
            # Two threads wait for each other, for long where others take their cores.
            "OMP_NUM_THREADS": "1",
            **cli.environment(),
            "COLUMNS": "100",
            "NEMORUN_HOME": str(directory.parent / "nemorun_home"),
        }
    )
    return stored(executed)


def stored(notebook: NotebookNode) -> NotebookNode:
    """Return a notebook as it is stored: cells by number, streams in one piece, nothing else.

    Args:
        notebook: An executed notebook.
    """
    clean = nbformat.from_dict(notebook)
    clean["metadata"] = nbformat.from_dict(METADATA)
    for number, cell in enumerate(clean.cells):
        cell["id"], cell["metadata"] = f"cell-{number:02}", nbformat.from_dict({})
        if cell.cell_type == "code":
            cell["outputs"] = _merged(cell.outputs)
    return clean


def _merged(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Join what a stream brought in pieces, without what moves and colors a terminal."""
    merged: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and merged and merged[-1].get("name") == output.name:
            merged[-1]["text"] += output.text
        else:
            merged.append(output)
    for output in merged:
        if output.output_type == "stream":
            plain = _CODES.sub("", output.text).replace("\r\n", "\n")
            output["text"] = _OVERWRITTEN.sub("", plain)
        elif "metadata" in output:
            output["metadata"] = nbformat.from_dict({})
    return merged


def faults(notebook: NotebookNode) -> list[str]:
    """Return what a stored notebook must not have.

    Args:
        notebook: The notebook.
    """
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    found = [] if counts == list(range(1, len(code) + 1)) else [f"execution counts are {counts}"]
    return found + [f"{cell.id}: {fault}" for cell in code for fault in _faults_of(cell)]


def _faults_of(cell: NotebookNode) -> Iterator[str]:
    if _SHOWS.search(cell.source) and not cell.outputs:
        yield "shows nothing"
    for output in cell.outputs:
        if output.output_type == "error":
            yield f"has failed with {output.ename}: {output.evalue}"
    for path in _OF_A_MACHINE.findall(shown(cell)):
        yield f"shows {path}, which is of the machine that it ran on"


def shown(cell: NotebookNode) -> str:
    """Return the text that a cell shows."""
    texts = (
        text
        for output in cell.outputs
        for text in (output.get("text", ""), *_texts(output.get("data", {})))
    )
    return "\n".join(texts)


def _texts(data: NotebookNode) -> list[str]:
    return [value for kind, value in data.items() if kind.startswith("text/")]


def new(source: str) -> NotebookNode:
    """Return a notebook of one cell."""
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])


def read(path: Path) -> NotebookNode:
    """Read a notebook."""
    return nbformat.read(path, as_version=4)


def text(notebook: NotebookNode) -> str:
    """Return a notebook as its file."""
    return nbformat.writes(notebook) + "\n"


def main(numbers: list[str]) -> None:
    """Execute and store the notebooks of these numbers, without any all."""
    chosen = [path for path in NOTEBOOKS if not numbers or path.name[:2] in numbers]
    with tempfile.TemporaryDirectory() as scratch:
        for path in chosen:
            done = execute(read(path), Path(scratch) / "examples")
            for fault in faults(done):
                print(f"{path.name}: {fault}", file=sys.stderr)
            path.write_text(text(done))
            print(f"{path.name}: {path.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

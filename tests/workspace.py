"""A directory laid out as the demo's, with little data and a tiny dense checkpoint."""

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

from nemo_upcycle.data.preparation import Preparation, prepare
from nemo_upcycle.data.tokenizer import train_tokenizer
from tests.tiny import write_llama

VOCAB_SIZE = 512
DOCUMENTS = 150
"""Enough that 1% of them is one: every split needs a document."""


def make_workspace(directory: Path) -> Path:
    """Write `data/`, `tokenizer/` and `dense_hf/` (with the tokenizer in it)."""
    made = _first()
    shutil.copytree(made, directory, dirs_exist_ok=True)
    for manifest in directory.glob("data/*.manifest.json"):  # which says where its texts lie
        manifest.write_text(manifest.read_text().replace(str(made), str(directory)))
    return directory


@cache
def _first() -> Path:
    """Return the workspace that all others of this process are copies of."""
    directory = Path(tempfile.mkdtemp(prefix="workspace-")) / "first"
    atexit.register(shutil.rmtree, directory.parent, ignore_errors=True)
    sources = {"documentation": "*.py", "sources": "*/*.py"}
    library = Path(json.__file__).parent.parent
    for name, pattern in sources.items():
        files = sorted(library.glob(pattern))[:DOCUMENTS]
        _write_jsonl(directory / "data" / f"{name}.jsonl", files)
    corpora = [directory / "data" / f"{name}.jsonl" for name in sources]
    train_tokenizer(corpora, directory / "tokenizer", VOCAB_SIZE)
    for corpus in corpora:
        prepare(Preparation((str(corpus),), directory / "tokenizer", corpus.with_suffix("")))
    write_llama(directory / "dense_hf", vocab_size=VOCAB_SIZE, max_position_embeddings=256)
    for file in (directory / "tokenizer").iterdir():
        (directory / "dense_hf" / file.name).write_bytes(file.read_bytes())
    return directory


def _write_jsonl(path: Path, files: list[Path]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": file.read_text(errors="ignore")[:4_000]}) for file in files]
    path.write_text("\n".join(lines) + "\n")

"""Documents in every format, and Megatron's datasets that are made of them."""

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from nemo_upcycle.cli import app
from nemo_upcycle.data.manifest import Manifest
from nemo_upcycle.data.preparation import Preparation, prepare

TEXTS = ["Every expert starts as the dense layer.", "日本語 ü", "", "def f():\n    return 1\n", "x"]
EOS = 1


def lines(texts: Sequence[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text}) + "\n" for text in texts).encode()


def write(path: Path, texts: Sequence[str]) -> Path:
    path.write_bytes(lines(texts))
    return path


def many(count: int, seed: int = 0) -> list[str]:
    """Return documents of very different lengths."""
    rng = random.Random(seed)
    words = [*["router", "expert", "dense", "token"], "日本", "\n"]
    return [" ".join(rng.choices(words, k=rng.choice([0, 1, 5, 40, 400]))) for _ in range(count)]


def prepared(
    source: Path | str, tokenizer: Path, prefix: Path, workers: int = 1, **options: Any
) -> Manifest:
    sources = (str(source),)
    return prepare(Preparation(sources, tokenizer, prefix, **options), workers)


def expected_documents(tokenizer: Path, texts: Sequence[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(tokenizer))
    return [[*loaded.encode(text), EOS] for text in texts if text]


def load(prefix: Path) -> Any:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(str(prefix))


def documents_in(prefix: Path) -> list[list[int]]:
    dataset = load(prefix)
    return [dataset[number].tolist() for number in range(len(dataset))]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def compressed(tmp_path: Path, texts: Sequence[str]) -> Path:
    path = tmp_path / "a.jsonl.gz"
    half = len(texts) // 2  # two members, as `cat` makes of two files
    path.write_bytes(gzip.compress(lines(texts[:half])) + gzip.compress(lines(texts[half:])))
    return path


def zstandard(tmp_path: Path, texts: Sequence[str]) -> Path:
    import pyarrow

    path, half = tmp_path / "a.jsonl.zst", len(texts) // 2
    frames = (pyarrow.compress(lines(some), "zstd", asbytes=True) for some in
              (texts[:half], texts[half:]))  # fmt: skip
    path.write_bytes(b"".join(frames))
    return path


def parquet(tmp_path: Path, texts: Sequence[str]) -> Path:
    import pyarrow
    from pyarrow.parquet import write_table

    table = pyarrow.table({"id": list(range(len(texts))), "text": list(texts)})
    write_table(table, tmp_path / "a.parquet", row_group_size=7)
    return tmp_path / "a.parquet"


def directory(tmp_path: Path, texts: Sequence[str]) -> Path:
    """Two files in a directory, one of them deep, beside one of no documents."""
    (tmp_path / "corpus" / "deep").mkdir(parents=True)
    half = len(texts) // 2
    write(tmp_path / "corpus" / "a.jsonl", texts[:half])
    write(tmp_path / "corpus" / "deep" / "b.json", texts[half:])
    (tmp_path / "corpus" / "README.md").write_text("no documents")
    return tmp_path / "corpus"


def tokenized(source: Path | str, tokenizer: Path, out: Path, *options: str) -> Result:
    """Call `nemo-upcycle data tokenize` in one process."""
    words = ["data", "tokenize", str(source), "--tokenizer", str(tokenizer), "--out", str(out)]
    return CliRunner().invoke(app, [*words, "--workers", "1", *options])

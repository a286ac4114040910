"""Tokens a second from text to Megatron's files: ours, a single loop, and Megatron's script's way.

The same text, tokenizer and cores; each in a fresh process, in turn:

- ours: `nemo-upcycle data tokenize`, with checksums and a manifest;
- loop: one process that reads a line, tokenises it and adds it to Megatron's builder;
- Megatron: as its `tools/preprocess_data.py`: a pool of processes that get lines and send tokens
  back to one that writes, with its chunk size of 32 lines.

Seconds are those of the work. The start of processes, with imports and loading the tokenizer, is
not counted for the loop and Megatron's way; it is for ours, as the command does all of it.

Usage: python -m benchmarks.data [--megabytes 60] [--runs 3]
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nemo_upcycle.data.parts import load_tokenizer, token_dtype
from nemo_upcycle.data.preparation import Preparation, prepare
from nemo_upcycle.data.sample import write_stdlib_sample
from nemo_upcycle.data.tokenizer import train_tokenizer

CORES = os.cpu_count() or 1
CHUNK = 32
PACKAGES = ("tokenizers", "transformers", "megatron-core")
_tokenizer: Any = None


def corpus(directory: Path, megabytes: int) -> Path:
    """Write the standard library's text, as often as it takes, and a tokenizer."""
    files = list(write_stdlib_sample(directory / "data").values())
    train_tokenizer(files, directory / "tokenizer", 8192)
    text = b"".join(file.read_bytes() for file in files)
    times = max(1, megabytes * 2**20 // len(text))
    (directory / "corpus.jsonl").write_bytes(text * times)
    return directory / "corpus.jsonl"


def _begin(directory: Path) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = load_tokenizer(directory)


def _encode(line: bytes) -> list[int]:
    tokens = _tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
    return [*tokens, _tokenizer.eos_token_id] if tokens else []


def ours(source: Path, tokenizer: Path, prefix: Path) -> Callable[[], int]:
    """Prepare it as the command does."""
    preparation = Preparation((str(source),), tokenizer, prefix, part_bytes=2**23)
    return lambda: prepare(preparation, CORES).tokens


def _builder(tokenizer: Path, prefix: Path) -> Any:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    return IndexedDatasetBuilder(f"{prefix}.bin", dtype=token_dtype(load_tokenizer(tokenizer)))


def loop(source: Path, tokenizer: Path, prefix: Path) -> Callable[[], int]:
    """Add line after line."""
    builder = _builder(tokenizer, prefix)
    _begin(tokenizer)

    def work() -> int:
        with source.open("rb") as file:
            return _add(builder, map(_encode, file), prefix)

    return work


def megatron(source: Path, tokenizer: Path, prefix: Path) -> Callable[[], int]:
    """Give lines to a pool, and add what it sends back."""
    builder = _builder(tokenizer, prefix)
    pool = multiprocessing.get_context("spawn").Pool(CORES, _begin, (tokenizer,))
    pool.map(abs, range(CORES))  # they have begun

    def work() -> int:
        with source.open("rb") as file:
            found = _add(builder, pool.imap(_encode, file, CHUNK), prefix)
        pool.terminate()
        return found

    return work


def _add(builder: Any, documents: Any, prefix: Path) -> int:
    for document in documents:
        if document:
            builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return sum(builder.sequence_lengths)


METHODS = {"ours": ours, "loop": loop, "Megatron": megatron}


def timed(name: str, source: Path, tokenizer: Path, prefix: Path, answer: Any) -> None:
    """Time a method; runs in a process of its own."""
    import megatron.core.datasets.indexed_dataset  # noqa: F401
    import transformers  # noqa: F401

    work = METHODS[name](source, tokenizer, prefix)
    started = time.perf_counter()
    tokens = work()
    answer.put((time.perf_counter() - started, tokens))


def main() -> None:
    """Print the results as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        source = corpus(directory, options.megabytes)
        for run in range(options.runs):
            for name in METHODS:
                answer = context.Queue()
                prefix = directory / f"{name}-{run}"
                arguments = (name, source, directory / "tokenizer", prefix, answer)
                process = context.Process(target=timed, args=arguments)
                process.start()
                took, tokens = answer.get()
                process.join()
                seconds[name].append(took)
        same = {(directory / f"{name}-0.bin").read_bytes() for name in METHODS}
        size = source.stat().st_size / 2**20
    print(f"# {date.today()}, from text to Megatron's files, CPU\n")
    print(
        f"`python -m benchmarks.data`, {CORES} cores, {size:.0f} MiB, {tokens:,} tokens, vocabulary"
    )
    packages = ", ".join(
        f"{n} {version(n)}" for n in ("tokenizers", "transformers", "megatron-core")
    )
    print(f"of 8,192; {packages}; medians of {options.runs} runs, in turn.\n")
    print("| method | tokens/s | s | fastest | slowest | against the loop |")
    print("|---|---|---|---|---|---|")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        ratio = medians["loop"] / medians[name]
        row = f"{medians[name]:.1f} | {min(values):.1f} | {max(values):.1f} | {ratio:.2f} ×"
        print(f"| {name} | {tokens / medians[name]:,.0f} | {row} |")
    print(f"\nTheir tokens are {'the same' if len(same) == 1 else 'NOT the same'}.")


if __name__ == "__main__":
    main()

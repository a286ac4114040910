"""Tokens per second from text to Megatron's files: ours, a single loop, and Megatron's script.

The same text, tokenizer and cores; each in a fresh process, in turn:

- ours: `nemo-upcycle data tokenize`, with checksums and a manifest;
- loop: one process that reads a line, tokenizes it and adds it to Megatron's builder;
- pool: as Megatron-LM's `tools/preprocess_data.py`: processes that get lines, 32 at a time, and
  send tokens back to one that writes;
- partitions: the same script with `--partitions`: the text is split into one file per core. Each
  file has a process that tokenizes and a process that writes, and the results are merged.

Megatron-Core's wheel has no such script; these are its loops around Megatron-Core's own builder.

Seconds are wall time and CPU time of all processes; on a busy machine only CPU time is meaningful.
Imports of the first process are not counted. Starting processes and loading the tokenizer count for
ours, but not for Megatron's ways.

Usage: python -m benchmarks.data [--megabytes 150] [--runs 3]
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import psutil

from nemo_upcycle.data.encoder import load_encoder, load_tokenizer
from nemo_upcycle.data.preparation import Preparation, prepare
from nemo_upcycle.data.sample import write_stdlib_sample
from nemo_upcycle.data.tokenizer import train_tokenizer

CORES = os.cpu_count() or 1
CHUNK = 32
PACKAGES = ("tokenizers", "transformers", "megatron-core")
_tokenizer: Any = None


def corpus(directory: Path, megabytes: int) -> Path:
    """Write a corpus of repeated text from the standard library, and train a tokenizer."""
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
    """Prepare the dataset like the command."""
    preparation = Preparation((str(source),), tokenizer, prefix)
    return lambda: prepare(preparation, CORES).tokens


def _builder(tokenizer: Path, prefix: Path) -> Any:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    return IndexedDatasetBuilder(
        f"{prefix}.bin", dtype=getattr(numpy, load_encoder(tokenizer).dtype)
    )


def loop(source: Path, tokenizer: Path, prefix: Path) -> Callable[[], int]:
    """Tokenize and add line by line."""
    builder = _builder(tokenizer, prefix)
    _begin(tokenizer)

    def work() -> int:
        with source.open("rb") as file:
            return _add(builder, map(_encode, file), prefix)

    return work


def pool(source: Path, tokenizer: Path, prefix: Path, size: int = CORES) -> Callable[[], int]:
    """Send lines to a process pool, and add the returned tokens."""
    builder = _builder(tokenizer, prefix)
    processes = multiprocessing.get_context("spawn").Pool(size, _begin, (tokenizer,))
    processes.map(abs, range(size))  # all processes have started

    def work() -> int:
        with source.open("rb") as file:
            found = _add(builder, processes.imap(_encode, file, CHUNK), prefix)
        processes.close()
        processes.join()
        return found

    return work


def partitions(source: Path, tokenizer: Path, prefix: Path) -> Callable[[], int]:
    """Split the text, tokenize each piece in separate processes, and merge the results."""
    builder = _builder(tokenizer, prefix)
    context = multiprocessing.get_context("spawn")
    pieces = [prefix.with_name(f"{prefix.name}_{number}") for number in range(CORES)]
    begun, cut = context.Barrier(CORES + 1), context.Event()
    processes = [
        context.Process(target=_partition, args=(tokenizer, piece, begun, cut)) for piece in pieces
    ]
    for process in processes:
        process.start()
    begun.wait()

    def work() -> int:
        _cut(source, [piece.with_suffix(".jsonl") for piece in pieces])
        cut.set()
        for process in processes:
            process.join()
        for piece in pieces:
            builder.add_index(str(piece))
        builder.finalize(f"{prefix}.idx")
        return sum(builder.sequence_lengths)

    return work


def _cut(source: Path, pieces: list[Path]) -> None:
    """Write equally many lines into each file, like `--keep-sequential-samples`."""
    with source.open("rb") as lines:
        each = -(-sum(1 for _ in lines) // len(pieces))
        lines.seek(0)
        for piece in pieces:
            with piece.open("wb") as file:
                file.writelines(islice(lines, each))


def _partition(tokenizer: Path, piece: Path, begun: Any, cut: Any) -> None:
    work = pool(piece.with_suffix(".jsonl"), tokenizer, piece, size=1)
    begun.wait()
    cut.wait()
    work()


def _add(builder: Any, documents: Any, prefix: Path) -> int:
    for document in documents:
        if document:
            builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return sum(builder.sequence_lengths)


METHODS = {"ours": ours, "loop": loop, "pool": pool, "partitions": partitions}


def timed(name: str, source: Path, tokenizer: Path, prefix: Path, answer: Any) -> None:
    """Time a method; runs in a separate process."""
    import megatron.core.datasets.indexed_dataset  # noqa: F401
    import transformers  # noqa: F401

    work = METHODS[name](source, tokenizer, prefix)
    begun = [psutil.Process(), *psutil.Process().children(recursive=True)]
    before = sum(sum(process.cpu_times()[:2]) for process in begun)
    started = time.perf_counter()
    tokens = work()
    seconds = time.perf_counter() - started
    # All child processes have ended, so the CPU time includes them.
    answer.put((seconds, sum(psutil.Process().cpu_times()[:4]) - before, tokens))


def main() -> None:
    """Print the results as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=150)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
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
                *took, tokens = answer.get()
                process.join()
                seconds[name].append(tuple(took))
                print(name, *took, file=sys.stderr, flush=True)
        same = {(directory / f"{name}-0.bin").read_bytes() for name in METHODS}
        size = source.stat().st_size / 2**20
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"{date.today()}: {CORES} cores, {packages}. {size:.0f} MiB, {tokens:,} tokens of 8,192.")
    print(f"Medians of {options.runs}, in turn.\n")
    print("| method | s | fastest–slowest | tokens/s | loop / this | CPU s | loop / this: CPU |")
    print("|---|---|---|---|---|---|---|")
    wall, cpu = ({name: statistics.median(one[kind] for one in values)
                  for name, values in seconds.items()} for kind in (0, 1))  # fmt: skip
    for name, values in seconds.items():
        took = [one[0] for one in values]
        row = f"{wall[name]:.1f} | {min(took):.1f}–{max(took):.1f} | {tokens / wall[name]:,.0f}"
        ratios = wall["loop"] / wall[name], cpu["loop"] / cpu[name]
        print(f"| {name} | {row} | {ratios[0]:.2f} | {cpu[name]:.1f} | {ratios[1]:.2f} |")
    print(f"\nTheir tokens are {'the same' if len(same) == 1 else 'NOT the same'}.")


if __name__ == "__main__":
    main()

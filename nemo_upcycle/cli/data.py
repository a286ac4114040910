"""`nemo-upcycle data`: text, tokenizer, Megatron's files, tasks."""

from pathlib import Path
from typing import Annotated

import typer

from nemo_upcycle.cli.tools import Directory, one_line_errors, progress

app = typer.Typer(help="Text, tokenizer and Megatron .bin/.idx files.", no_args_is_help=True)


@app.command("sample")
@one_line_errors
def sample(out: Directory) -> None:
    """Write real text from this Python's standard library, as two JSONL files.

    `documentation.jsonl` holds its documentation and docstrings, `sources.jsonl` its sources
    without docstrings. 11 MB in all, 3M tokens; nothing is downloaded.
    """
    from nemo_upcycle.data.sample import write_stdlib_sample

    for path in write_stdlib_sample(out).values():
        typer.echo(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


@app.command("tokenizer")
@one_line_errors
def tokenizer(
    files: Annotated[list[Path], typer.Argument(help="JSONL files with a `text` field.")],
    out: Directory,
    vocab_size: Annotated[int, typer.Option(help="Tokens in the vocabulary.")] = 2048,
) -> None:
    """Train a byte-level BPE tokenizer, in Hugging Face's format."""
    from nemo_upcycle.data.tokenizer import train_tokenizer

    typer.echo(f"{out}: {train_tokenizer(files, out, vocab_size)} tokens")


@app.command("tokenize")
@one_line_errors
def tokenize(
    files: Annotated[list[Path], typer.Argument(help="JSONL files with a `text` field.")],
    tokenizer: Annotated[Path, typer.Option(help="Directory of the tokenizer.")],
    out: Directory,
) -> None:
    """Write Megatron .bin/.idx files, one pair a JSONL file, named after it."""
    from nemo_upcycle.data.indexed import build_indexed_dataset

    for file in files:
        with progress(file.name) as show:
            stats = build_indexed_dataset(file, tokenizer, out / file.stem, progress=show)
        typer.echo(f"{stats.prefix}: {stats.documents} documents, {stats.tokens} tokens")


@app.command()
@one_line_errors
def choices(
    files: Annotated[list[Path], typer.Argument(help="JSONL files with a `text` field.")],
    out: Directory,
    items: Annotated[int, typer.Option(help="Questions.")] = 500,
    name: Annotated[str, typer.Option(help="The task's name.")] = "next_line",
) -> None:
    """Make a multiple-choice task for lm-eval of held-out text: which line comes next?

    Of the last 3% of each file's documents, which the recipes do not train on. Works offline:
    `nemo-upcycle evaluate … --tasks next_line --include-path DIR`.
    """
    from nemo_upcycle.data.choices import write_choices

    count = write_choices(files, out, name, items)
    typer.echo(f"{out / name}.yaml: {count} questions")

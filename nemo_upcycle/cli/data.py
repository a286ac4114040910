"""`nemo-upcycle data`: text, tokenizer, Megatron's files, tasks."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemo_upcycle.cli.tools import Directory, check_file_writable, one_line_errors
from nemo_upcycle.errors import UpcyclingError, listing
from nemo_upcycle.progress import Progress, progress

if TYPE_CHECKING:
    from nemo_upcycle.data.manifest import Manifest
    from nemo_upcycle.data.preparation import Preparation

Workers = Annotated[
    int | None,
    typer.Option(help="Processes. Default: one per core.", min=1, show_default=False),
]
Evaluations = Annotated[
    Path | None,
    typer.Option(
        help="Evaluation items, written by `data items`: documents that share 13 consecutive words "
        "with an item are left out, and reported.",
        show_default=False,
    ),
]
MaxMalformed = Annotated[
    float, typer.Option(help="Largest allowed share of malformed lines.", min=0, max=1)
]

Tokenizer = Annotated[
    str,
    typer.Option(
        help="Directory of a tokenizer, or of a checkpoint with a tokenizer; or a model's name in "
        "the local hub cache."
    ),
]
ParseSpecial = Annotated[
    bool,
    typer.Option(
        "--parse-special",
        help="Turn text that spells a special token, such as </s>, into the token. Default: text.",
    ),
]

app = typer.Typer(help="Text, tokenizer and Megatron .bin/.idx files.", no_args_is_help=True)


@app.command("sample")
@one_line_errors
def sample(
    out: Directory,
    packages: Annotated[
        bool,
        typer.Option(
            "--packages", help="Of all installed packages, as whole files: some 500 MB of text."
        ),
    ] = False,
) -> None:
    """Write real text from this Python's standard library, as two JSONL files.

    `documentation.jsonl` holds the documentation and docstrings, `sources.jsonl` the sources
    without docstrings: 11 MB in total, 3M tokens. With --packages they hold the documentation files
    and the sources of all installed packages, each text once, in an order that is random but always
    the same. Nothing is downloaded.
    """
    from nemo_upcycle.data.package_sample import write_package_sample
    from nemo_upcycle.data.sample import write_stdlib_sample

    for path in (write_package_sample if packages else write_stdlib_sample)(out).values():
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
    sources: Annotated[
        list[str],
        typer.Argument(
            help="JSONL (.gz, .zst) or Parquet: files, directories, URLs; "
            "hf://NAME?config=…&split=… on the hub; "
            "redpajama-v2://[BASE]?snapshots=…&language=en&bucket=head&shards=0-99.",
            show_default=False,
        ),
    ],
    tokenizer: Tokenizer,
    out: Directory,
    name: Annotated[
        str | None,
        typer.Option(
            help="Put all sources into one dataset of this name. Default: one dataset per source.",
            show_default=False,
        ),
    ] = None,
    workers: Workers = None,
    text_key: Annotated[str, typer.Option(help="The field with the text.")] = "text",
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=VALUE: only such records; repeatable.",
            show_default=False,
        ),
    ] = None,
    without: Evaluations = None,
    max_malformed: MaxMalformed = 0.01,
    parse_special: ParseSpecial = False,
) -> None:
    """Write Megatron .bin/.idx files, with an end-of-document token after each document.

    Works in parallel, part by part. After a kill the same command continues and repeats no
    complete part. NAME.manifest.json lists the sources and the checksums of the files;
    NAME.malformed.jsonl locates each malformed line.

    \b
    Examples:
      nemo-upcycle data tokenize web.jsonl.zst --tokenizer tokenizer --out data
      nemo-upcycle data tokenize crawl/ --name web --text-key raw_content \\
        --where bucket=head --tokenizer tokenizer --out data
      nemo-upcycle data tokenize "hf://wikimedia/wikipedia?config=20231101.en" \\
        --name wikipedia --tokenizer tokenizer --out data
      nemo-upcycle data tokenize "redpajama-v2://?snapshots=2023-06&shards=0-99" \\
        --text-key raw_content --where bucket=head --tokenizer tokenizer --out data
    """
    from nemo_upcycle.data.preparation import Preparation
    from nemo_upcycle.data.selection import Selection
    from nemo_upcycle.data.sources import files_of

    selection = Selection(text_key, dict(map(_field, where or [])))
    groups = _datasets(sources, name)
    if len(groups) > 1:  # check all before preparing the first
        for of_dataset in groups.values():
            files_of(of_dataset)
    found_tokenizer = _tokenizer_of(tokenizer)
    for dataset, of_dataset in groups.items():
        of_job = of_dataset, found_tokenizer, out / dataset, selection, without, max_malformed
        _prepare(Preparation(*of_job, parse_special=parse_special), workers)


def _datasets(sources: list[str], name: str | None) -> dict[str, tuple[str, ...]]:
    """Return the sources of each dataset, by the dataset's name."""
    from nemo_upcycle.data.paths import check_dataset_name
    from nemo_upcycle.data.sources import name_of

    if name is not None:
        check_dataset_name(name, "--name is")
        return {name: tuple(sources)}
    for source in sources:
        check_dataset_name(name_of(source), f"Give a --name: {source} makes a dataset called")
    groups: dict[str, tuple[str, ...]] = {name_of(source): (source,) for source in sources}
    if len(groups) < len(sources):
        raise UpcyclingError(
            f"{len(sources)} sources are called {', '.join(groups)}; expected a name per dataset. "
            "Give a --name."
        )
    return groups


def _prepare(preparation: "Preparation", workers: int | None) -> "Manifest":
    from nemo_upcycle.data.preparation import prepare
    from nemo_upcycle.data.sources import passed_over

    prefix = preparation.prefix
    with progress(prefix.name) as show:
        manifest = prepare(preparation, workers or os.cpu_count() or 1, _speed(show))
    typer.echo(f"{prefix}: {manifest.documents} documents, {manifest.tokens} tokens")
    for source in preparation.sources:
        if skipped := passed_over(source):
            typer.echo(f"{source}: passed over {skipped}", err=True)
    if manifest.spelled:
        taken = "taken for them" if preparation.parse_special else "text: --parse-special"
        typer.echo(f"{manifest.spelled} spelled special tokens are {taken}", err=True)
    if bare := [each["source"] for each in manifest.sources if not each["documents"]]:
        typer.echo(f"{len(bare)} sources gave no document: {listing(bare)}", err=True)
    for kind in ("malformed", "contaminated"):
        if count := getattr(manifest, kind):
            typer.echo(f"{count} {kind} left out: {prefix}.{kind}.jsonl", err=True)
    return manifest


def _tokenizer_of(source: str) -> Path:
    """Return a tokenizer's directory.

    Warn before the work if documents would end with a token that may not be intended.
    """
    from nemo_upcycle.checkpoint.tokenizer_directory import named_tokenizer
    from nemo_upcycle.checkpoint.tokenizer_files import doubtful_end, load_tokenizer

    directory = named_tokenizer(source)
    if doubt := doubtful_end(load_tokenizer(directory), directory):
        typer.echo(f"Warning: {doubt}", err=True)
    return directory


@app.command()
@one_line_errors
def blend(
    source: Annotated[
        str, typer.Argument(help="A YAML file, or llama3_moe for the paper's.", show_default=False)
    ],
    tokenizer: Tokenizer,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Directory to write to. Default: from the YAML."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Prepare only this dataset; may be repeated.", show_default=False),
    ] = None,
    workers: Workers = None,
    without: Evaluations = None,
    max_malformed: MaxMalformed = 0.01,
    parse_special: ParseSpecial = False,
) -> None:
    """Prepare all datasets of a blend; the recipes accept the same YAML as `data_blend`.

    After a kill the same command continues.

    \b
    Examples:
      nemo-upcycle data items mmlu,piqa,sciq --out items.jsonl
      nemo-upcycle data blend llama3_moe --tokenizer tokenizer --out data \\
        --without items.jsonl
    """
    from nemo_upcycle.data.blend import read_blend
    from nemo_upcycle.data.preparation import Preparation

    lasts = {}
    written = read_blend(source, out)
    names = [each.name for each in written.datasets]
    for name in only or ():
        if name not in names:
            raise UpcyclingError(f"There is no dataset {name!r}; expected one of {names}.")
    found_tokenizer = _tokenizer_of(tokenizer)
    for each in written.datasets:
        if only is None or each.name in only:
            made_of = each.sources, found_tokenizer, each.prefix, each.selection
            of_job = *made_of, without, max_malformed
            manifest = _prepare(Preparation(*of_job, parse_special=parse_special), workers)
            lasts[each.name] = int(manifest.tokens / each.weight)
    first = min(lasts, key=lambda name: lasts[name])
    typer.echo(f"Training reads {first} the most often: once every {lasts[first]:,} tokens.")
    typer.echo(f"Train on the blend with data_paths='{written.data_paths}'")


@app.command()
@one_line_errors
def items(
    tasks: Annotated[str, typer.Argument(help="lm-eval's tasks, separated by commas.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    include_path: Annotated[
        Path | None, typer.Option(help="Directory of tasks of your own.", show_default=False)
    ] = None,
) -> None:
    """Write the items of evaluations, which training data must not contain, for `--without`."""
    from nemo_upcycle.evaluation.items import write_items

    check_file_writable(out)
    count = write_items([name for name in tasks.split(",") if name], out, include_path)
    typer.echo(f"{out}: {count} items")


def _field(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UpcyclingError(f"--where is {text}; expected KEY=VALUE.")
    return key, value


def _speed(show: Progress) -> Callable[[int, int, int], None]:
    started = time.monotonic()

    def told(done: int, total: int, tokens: int) -> None:
        seconds = max(1e-3, time.monotonic() - started)
        show(done, total, f"{tokens / seconds:,.0f} tokens/s")

    return told


@app.command()
@one_line_errors
def check(
    prefixes: Annotated[list[Path], typer.Argument(help="Datasets, without .bin and .idx.")],
) -> None:
    """Compare datasets with the checksums in their manifests."""
    from nemo_upcycle.data.manifest import check_files

    for prefix in prefixes:
        with progress(prefix.name) as show:
            manifest = check_files(prefix, show)
        typer.echo(f"{prefix}: as written, {manifest.documents} documents")


@app.command()
@one_line_errors
def choices(
    files: Annotated[list[Path], typer.Argument(help="JSONL files with a `text` field.")],
    out: Directory,
    items: Annotated[int, typer.Option(help="Questions.")] = 500,
    name: Annotated[str, typer.Option(help="The task's name.")] = "next_line",
) -> None:
    """Make a multiple-choice task for lm-eval from held-out text: which line comes next?

    The text is the last 3% of each file's documents, on which the recipes do not train. Works
    offline: `nemo-upcycle evaluate … --tasks next_line --include-path DIR`.
    """
    from nemo_upcycle.data.choices import write_choices

    count = write_choices(files, out, name, items)
    typer.echo(f"{out / name}.yaml: {count} questions")

"""`nemo-upcycle calibrate`: statistics of a dense model over text, for initializers."""

import os
from pathlib import Path
from typing import Annotated

import typer

from nemo_upcycle.cli.tools import at_least, check_file_writable, one_line_errors
from nemo_upcycle.cli.worth import count
from nemo_upcycle.progress import progress, size

MOST_PROCESSES = 8
"""Processes without --processes, at most: each holds a layer in fp32."""


@one_line_errors
def calibrate(
    dense: Annotated[
        str,
        typer.Argument(
            help="The dense checkpoint: a Hugging Face directory, or a name in the local hub "
            "cache; several, separated by semicolons, as `upcycle` takes them."
        ),
    ],
    text: Annotated[
        list[str],
        typer.Option(
            help="A source of text: JSON lines, Parquet, a directory or hf://NAME. Several sources "
            "are told apart; with several dense checkpoints, one for each."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    tokens: Annotated[str, typer.Option(help="Tokens in all, such as 1M.")] = "1M",
    sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens per sequence. Default: 2048, or the model's context if shorter."),
    ] = None,
    clusters: Annotated[
        int, typer.Option(help="Clusters of inputs per layer: one per copy of the layer.")
    ] = 8,
    cluster_rank: Annotated[
        int,
        typer.Option(
            help="Rank of weights fitted to each cluster, which `cluster_svd` needs. Default: none."
        ),
    ] = 0,
    sample: Annotated[str, typer.Option(help="Tokens whose inputs are clustered.")] = "16384",
    second_moment: Annotated[
        str,
        typer.Option(
            help="Second moment of the inputs: none, diagonal, or full, which `ridge` needs."
        ),
    ] = "diagonal",
    prompts: Annotated[
        Path | None,
        typer.Option(help="A line of JSON per expert, with positive and negative prompts."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Directory of a tokenizer. Default: the checkpoint's.")
    ] = None,
    text_key: Annotated[str, typer.Option(help="Field of a record with the text.")] = "text",
    seed: Annotated[int, typer.Option(help="Seed of the sample and the clusters.")] = 1234,
    processes: Annotated[
        int | None,
        typer.Option(
            help=f"Processes, each with one thread and a layer. Default: one per core, up to "
            f"{MOST_PROCESSES}.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run a dense model over text, layer by layer, and keep what initializers need.

    Per layer: mean and second moment of the feed-forward layer's inputs, clusters of inputs, how
    often and how strongly each neuron is active; also per source of text. The model may be larger
    than memory. The same command goes on after a kill. The file is the same for any --processes.

    \b
    Examples:
      nemo-upcycle calibrate SmolLM2-135M --text web.jsonl --out stats.safetensors
      nemo-upcycle calibrate Llama-3.1-8B --text web.jsonl --text code.jsonl --tokens 2M -o STATS
      nemo-upcycle upcycle Llama-3.1-8B OUT --router-initializer "centroids(stats='STATS')"
    """
    from nemo_upcycle.calibration.calibrate import Calibration, calibrate

    at_least("--processes", processes, 1)
    check_file_writable(out)
    calibration = Calibration(
        dense=dense,
        texts=tuple(text),
        out=out,
        tokens=int(count("--tokens", tokens)),
        sequence_length=sequence_length,
        clusters=clusters,
        cluster_rank=cluster_rank,
        sample=int(count("--sample", sample)),
        second_moment=second_moment,
        prompts=prompts,
        tokenizer=tokenizer,
        text_key=text_key,
        seed=seed,
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with progress("calibrate") as show:
        manifest = calibrate(calibration, processes or min(cores or 1, MOST_PROCESSES), show)
    texts = ", ".join(f"{each['name']} ({each['tokens']:,} tokens)" for each in manifest["texts"])
    typer.echo(
        f"{out}: {manifest['num_layers']} layers, {manifest['clusters']} clusters each, over "
        f"{texts}; {size(out.stat().st_size)}"
    )

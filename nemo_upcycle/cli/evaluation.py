"""`nemo-upcycle evaluate`, `verify` and `generate`: commands that run a model."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_upcycle.cli.ranks import EP, ETP, PP, TP, Ranks, check_there, folding_of, on_ranks
from nemo_upcycle.cli.tools import (
    at_least,
    check_file_writable,
    last_checkpoint,
    note,
    one_line_errors,
    one_of,
)
from nemo_upcycle.engine.launch import is_first_rank
from nemo_upcycle.files import check_writable, write_whole
from nemo_upcycle.progress import progress

if TYPE_CHECKING:
    from nemo_upcycle.evaluation.harness import Written
    from nemo_upcycle.evaluation.parity import Parity
    from nemo_upcycle.evaluation.scores import Results

Checkpoints = Annotated[
    list[Path],
    typer.Argument(
        help="NeMo 2, Megatron-LM or Hugging Face checkpoint; or a run's directory, which means "
        "the run's last complete checkpoint.",
        metavar="CHECKPOINT",
        show_default=False,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16. Default: the checkpoint's."),
]
BatchSize = Annotated[int, typer.Option(help="Rows per batch, over all ranks.")]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="Directory of the tokenizer. Default: the checkpoint's."),
]


@one_line_errors
def evaluate(
    checkpoints: Checkpoints,
    tasks: Annotated[
        str, typer.Option(help="lm-eval's tasks or groups, separated by commas.")
    ] = "",
    num_fewshot: Annotated[
        int | None,
        typer.Option(help="Examples before each question. Default: each task's own."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Maximum number of questions per task.")] = None,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper",
            help="Run the tasks of arXiv 2412.09952, Table 3, and show the paper's scores.",
        ),
    ] = False,
    dense: Annotated[
        Path | None,
        typer.Option(help="Dense checkpoint to evaluate too, or lm-eval's JSON results of one."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Directory of tasks of your own (YAML).")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write to.")] = Path(
        "evaluation"
    ),
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Keep every question with its log-likelihoods.")
    ] = False,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Use the tokenizer's chat template.")
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens per row. Default: the model's context length.")
    ] = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = None,
    tokenizer: Tokenizer = None,
    tp: TP = 1,
    pp: PP = 1,
    ep: EP = 1,
    etp: ETP = 1,
    ranks: Ranks = None,
) -> None:
    """Run lm-eval on a checkpoint without conversion, on any number of ranks.

    Writes lm-eval's JSON (`results.json`, `dense.json`) and a table (`scores.md`). Data sets on
    this machine are not downloaded again; the error for a missing data set names it. Experts drop
    no tokens, as in transformers. Both models get rows of the same length: `--max-length`, or the
    shorter context length of the two.

    \b
    Examples:
      nemo-upcycle evaluate demo/e8t2 --tasks next_line --include-path demo/task
      nemo-upcycle evaluate RUN/checkpoints/LAST --tasks mmlu --num-fewshot 5 --tp 2 --ep 4
      nemo-upcycle evaluate RUN --paper --dense /models/Meta-Llama-3-8B --ep 8
    """
    from nemo_upcycle.evaluation.tasks import (
        check_tasks,
        load_tasks,
        need_lm_eval,
        requests,
        stay_offline_without_a_hub,
    )

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    wanted = requests(names, num_fewshot, paper)
    at_least("--num-fewshot", num_fewshot, 0)
    for option, value in (
        ("--limit", limit),
        ("--batch-size", batch_size),
        ("--max-length", max_length),
    ):
        at_least(option, value, 1)
    folding = folding_of(tp, pp, ep, etp)
    check_writable(out)
    models = [last_checkpoint(one_of(checkpoints))]
    if dense is not None and dense.suffix != ".json":
        models.append(last_checkpoint(dense))
    check_there(*models)
    need_lm_eval()
    stay_offline_without_a_hub()

    from nemo_upcycle.evaluation import checks, harness
    from nemo_upcycle.evaluation.scores import row_length

    earlier: Results = {}
    if dense is not None and dense.suffix == ".json":
        earlier = harness.read_results(dense, wanted)
    checks.dtype_of(dtype)
    described = [checks.describe(model) for model in models]
    length = checks.row_length(described, max_length, row_length(earlier))
    options = harness.Options(
        folding,
        batch_size,
        limit,
        dtype,
        length,
        tokenizer,
        log_samples,
        apply_chat_template,
    )
    if dense is not None:
        harness.check_options(dense, earlier, options)
    on_ranks(folding, ranks)
    loaded = load_tasks(wanted, include_path)
    for known in described:
        chosen = checks.open_tokenizer(tokenizer or known.source)
        checks.check_tokenizer(chosen, known)
        if told := checks.other_tokens(chosen, known):
            note(told)
        if apply_chat_template:
            checks.check_chat_template(chosen)
    for told in check_tasks(loaded, length):
        if is_first_rank():
            typer.echo(told, err=True)

    written = harness.Written(out, several=len(wanted) > 1)
    results = {}
    for name, model in zip(("results", "dense"), models, strict=False):
        results[name] = harness.evaluate(model, loaded, options, partial(written.results, name))
    if earlier and dense is not None:
        if is_first_rank():
            harness.check_alike(dense, earlier, results["results"])
        results["dense"] = earlier
        if is_first_rank():
            for request, scored in earlier.items():
                written.results("dense", request, scored)
    if is_first_rank():
        _show_scores(written, results, paper)
    harness.end()
    written.check()


@one_line_errors
def verify(
    dense: Annotated[
        Path, typer.Argument(help="The dense checkpoint: Hugging Face.", show_default=False)
    ],
    moes: Annotated[
        list[Path],
        typer.Argument(
            help="The MoE: NeMo 2, Megatron-LM or Hugging Face; or a run's directory.",
            metavar="MOE",
            show_default=False,
        ),
    ],
    text: Annotated[
        Path | None,
        typer.Option(help="Text or JSONL file. Default: Python's own documentation."),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(
            help="Maximum number of tokens; at least one row longer than a sliding window."
        ),
    ] = 4096,
    weights: Annotated[
        bool, typer.Option(help="Compare all weights too, to say why the models differ.")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    batch_size: BatchSize = 4,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    tokenizer: Tokenizer = None,
    tp: TP = 1,
    pp: PP = 1,
    ep: EP = 1,
    etp: ETP = 1,
    ranks: Ranks = None,
) -> None:
    """Compare an MoE with the dense model that was upcycled, on the same text.

    Prints the largest difference of logits, KL divergence, loss and how often both models predict
    the same token. The verdict is "exact", or how far apart the models are and why. The exit code
    is 0 in both cases.

    \b
    Examples:
      nemo-upcycle verify demo/dense_hf demo/e8t2
      nemo-upcycle verify /models/Meta-Llama-3-8B e8t2_hf --text book.txt --dtype bfloat16 --tp 8
    """
    at_least("--tokens", tokens, 1)
    at_least("--batch-size", batch_size, 1)
    folding = folding_of(tp, pp, ep, etp)
    dense, moe = last_checkpoint(dense), last_checkpoint(one_of(moes))
    check_there(dense, moe)

    from nemo_upcycle.evaluation import checks, parity

    checks.dtype_of(dtype)
    described = [checks.describe(source) for source in (dense, moe)]
    chosen = checks.open_tokenizer(*([tokenizer] if tokenizer else [moe, dense]))
    for known in described:
        checks.check_tokenizer(chosen, known)
        if told := checks.other_tokens(chosen, known):
            note(told)
    words = parity.default_text() if text is None else parity.read_text(text)
    models_of = [known.arch for known in described if known.arch is not None]
    beyond = parity.length_beyond(tokens, *models_of)
    length = checks.row_length(described) or tokens
    ids = parity.rows_of(words, chosen, tokens, length, beyond)
    on_ranks(folding, ranks)

    from nemo_upcycle.evaluation import harness
    from nemo_upcycle.evaluation.opening import open_model

    models = [open_model(source, folding, dtype) for source in (dense, moe)]
    with progress("text") as show:
        comparison = parity.compare(models[0], models[1], ids, batch_size, show)
    if is_first_rank():
        why = list(parity.other_numbers(*reversed(models_of))) if len(models_of) == 2 else []
        if weights and not comparison.exact:
            why += _why(dense, moe)
        _show_parity(comparison, why, f"{dense} → {moe}, {dtype}", json)
    harness.end()


@one_line_errors
def generate(
    checkpoints: Checkpoints,
    prompt: Annotated[str, typer.Argument(help="The text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of new tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed for temperatures above 0.")] = 1234,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write the text to as well.")
    ] = None,
    dtype: Dtype = None,
    tokenizer: Tokenizer = None,
    tp: TP = 1,
    pp: PP = 1,
    ep: EP = 1,
    etp: ETP = 1,
    ranks: Ranks = None,
) -> None:
    """Continue a text with a checkpoint, until the model ends the text.

    \b
    Example:
      nemo-upcycle generate demo/e8t2_hf "def main():"
    """
    at_least("--max-new-tokens", max_new_tokens, 1)
    at_least("--temperature", temperature, 0)
    folding = folding_of(tp, pp, ep, etp)
    if out is not None:
        check_file_writable(out)
    checkpoint = last_checkpoint(one_of(checkpoints))
    check_there(checkpoint)

    from nemo_upcycle.evaluation import checks
    from nemo_upcycle.evaluation.generation import generation_config, go_on, prompt_ids

    checks.dtype_of(dtype)
    model = checks.describe(checkpoint)
    chosen = checks.open_tokenizer(tokenizer or checkpoint)
    checks.check_tokenizer(chosen, model)
    if told := checks.other_tokens(chosen, model):
        note(told)
    generation_config(checkpoint)
    ids = prompt_ids(chosen, prompt, model.context_length)
    room = max_new_tokens if model.context_length is None else model.context_length - len(ids)
    if room < max_new_tokens:
        note(
            f"--max-new-tokens is {max_new_tokens}; generating {room}, because the prompt has "
            f"{len(ids)} tokens and the model's context length is {model.context_length}"
        )
    on_ranks(folding, ranks)

    from nemo_upcycle.evaluation import harness
    from nemo_upcycle.evaluation.opening import open_model

    opened = open_model(checkpoint, folding, dtype)
    text = go_on(opened, chosen, ids, min(room, max_new_tokens), temperature, seed)
    if is_first_rank():
        typer.echo(text)
        if out is not None:
            write_whole(out, text + "\n")
    harness.end()


def _show_scores(written: "Written", models: dict[str, Any], paper: bool) -> None:
    from rich.console import Console

    from nemo_upcycle.evaluation.scores import markdown, render, row_lengths

    names = ["checkpoint", "dense"][: len(models)]
    results = list(models.values())
    written.text("scores.md", markdown(names, results, paper))
    console = Console()
    for table in render(names, results, paper):
        console.print(table)
    typer.echo(row_lengths(names, results))
    for file in written.files:
        typer.echo(file)


def _why(dense: Path, moe: Path) -> list[str]:
    from nemo_upcycle.checkpoint import open_checkpoint
    from nemo_upcycle.checkpoint.branches import split_sources
    from nemo_upcycle.checkpoint.kept import dense_checkpoints_in
    from nemo_upcycle.evaluation.parity import reasons
    from nemo_upcycle.trained.drift import drift
    from nemo_upcycle.trained.opened import open_trained

    checkpoint, trained = open_checkpoint(str(dense)), open_trained(moe)
    with progress("weights") as show:
        distance = drift(checkpoint, trained, show)
    arch = checkpoint.architecture
    sources = dense_checkpoints_in(trained.checkpoint.directory) or ""
    return list(reasons(distance, trained.model, arch, len(split_sources(sources or str(dense)))))


def _show_parity(comparison: "Parity", why: list[str], title: str, as_json: bool) -> None:
    import json
    from dataclasses import asdict

    if as_json:
        values = asdict(comparison) | {"exact": comparison.exact and not why, "why": why}
        typer.echo(json.dumps(values))
        return
    verdict = "exact: both compute the same, up to rounding"
    if not comparison.exact or why:
        verdict = f"not exact: {'; '.join(why) or 'the logits differ'}"
    if comparison.exact and why:
        verdict += " (which does not show in this text)"
    typer.echo(
        f"{title}, {comparison.tokens:,} tokens\n"
        f"  loss         {comparison.dense_loss:.6f} dense, {comparison.moe_loss:.6f} MoE\n"
        f"  KL           {comparison.kl:.3g} nats per token, from the dense model to the MoE\n"
        f"  top-1        {comparison.top1:.2%} of the predictions are the same\n"
        f"  logits       differ by at most {comparison.difference:.3g}; per token by at most "
        f"{comparison.relative:.3g} of the norm\n"
        f"  rounding     alone changes the dense model's logits by {comparison.rounding:.3g} of "
        f"the norm, summed in another order; up to {comparison.tolerance:.3g} counts as rounding\n"
        f"  {verdict}"
    )

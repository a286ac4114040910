"""`nemo-upcycle evaluate`, `verify` and `generate`: commands that run a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_upcycle.cli.ranks import EP, ETP, PP, TP, Ranks, check_there, folding_of, on_ranks
from nemo_upcycle.cli.tools import one_line_errors, progress
from nemo_upcycle.files import write_whole

if TYPE_CHECKING:
    from nemo_upcycle.evaluation.parity import Parity

Checkpoint = Annotated[
    Path, typer.Argument(help="NeMo 2, Megatron-LM or Hugging Face checkpoint.", show_default=False)
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; without it the checkpoint's."),
]
BatchSize = Annotated[int, typer.Option(help="Rows at a time, over all ranks.", min=1)]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="Directory of the tokenizer; without it the checkpoint's."),
]


@one_line_errors
def evaluate(
    checkpoint: Checkpoint,
    tasks: Annotated[
        str, typer.Option(help="lm-eval's tasks or groups, separated by commas.")
    ] = "",
    num_fewshot: Annotated[
        int | None,
        typer.Option(help="Examples before each question; without it each task's own."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task at most.")] = None,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper", help="Run the tasks of arXiv 2412.09952, Table 3, and show its scores."
        ),
    ] = False,
    dense: Annotated[
        Path | None,
        typer.Option(help="Checkpoint to evaluate beside it, or lm-eval's JSON of one."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Directory of tasks of your own (YAML).")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write to.")] = Path(
        "evaluation"
    ),
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Keep every question and its log-likelihoods.")
    ] = False,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask in the tokenizer's chat template.")
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a row; without it the model's.")
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
    """Run lm-eval on a checkpoint as it is, on any number of ranks.

    Writes lm-eval's JSON (`results.json`, `dense.json`) and a table (`scores.md`). Nothing is
    downloaded that is here; a data set that is missing is named. Experts drop no tokens, as in
    transformers.

    \b
    Examples:
      nemo-upcycle evaluate demo/e8t2/checkpoints/*-last --tasks next_line --include-path demo/task
      nemo-upcycle evaluate RUN/checkpoints/LAST --tasks mmlu --num-fewshot 5 --tp 2 --ep 4
      nemo-upcycle evaluate RUN/checkpoints/LAST --paper --dense /models/Meta-Llama-3-8B --ep 8
    """
    from nemo_upcycle.evaluation.tasks import load_tasks, need_lm_eval, requests

    wanted = requests([name for name in tasks.split(",") if name], num_fewshot, paper)
    folding = folding_of(tp, pp, ep, etp)
    dense_is_json = dense is not None and dense.suffix == ".json"
    check_there(checkpoint, None if dense_is_json else dense)
    need_lm_eval()
    on_ranks(folding, ranks)
    loaded = load_tasks(wanted, include_path)

    from nemo_upcycle.evaluation import harness
    from nemo_upcycle.evaluation.opening import is_first_rank

    options = harness.Options(
        folding,
        batch_size,
        limit,
        dtype,
        max_length,
        tokenizer,
        log_samples,
        apply_chat_template,
    )
    models = {"results": harness.evaluate(checkpoint, loaded, options)}
    if dense is not None and dense_is_json:
        models["dense"] = harness.read_results(dense, wanted)
    elif dense is not None:
        models["dense"] = harness.evaluate(dense, loaded, options)
    if is_first_rank():
        _show_scores(out, models, paper)
    harness.end()


@one_line_errors
def verify(
    dense: Annotated[
        Path, typer.Argument(help="The dense checkpoint: Hugging Face.", show_default=False)
    ],
    moe: Annotated[
        Path,
        typer.Argument(help="The MoE: NeMo 2, Megatron-LM or Hugging Face.", show_default=False),
    ],
    text: Annotated[
        Path | None,
        typer.Option(help="Text or JSONL file; without it the documentation of Python itself."),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(
            help="Tokens of it at most; one row beyond a sliding window all the same.", min=1
        ),
    ] = 4096,
    weights: Annotated[
        bool, typer.Option(help="Read all weights too, to say why the models differ.")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    batch_size: BatchSize = 4,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    tokenizer: Tokenizer = None,
    tp: TP = 1,
    pp: PP = 1,
    ep: EP = 1,
    etp: ETP = 1,
    ranks: Ranks = None,
) -> None:
    """Compare an MoE with the dense model that it became, on the same text.

    Largest difference of logits, KL divergence, loss and how often both predict the same token;
    says "exact", or how far and why. Exit code 0 either way.

    \b
    Examples:
      nemo-upcycle verify demo/dense_hf demo/e8t2
      nemo-upcycle verify /models/Meta-Llama-3-8B e8t2_hf --text book.txt --dtype bfloat16 --tp 8
    """
    folding = folding_of(tp, pp, ep, etp)
    check_there(dense, moe)
    on_ranks(folding, ranks)

    from nemo_upcycle.evaluation import harness, parity
    from nemo_upcycle.evaluation.opening import is_first_rank, open_model, open_tokenizer
    from nemo_upcycle.source import open_source

    chosen = open_tokenizer(*([tokenizer] if tokenizer else [moe, dense]))
    models = [open_model(source, folding, dtype) for source in (dense, moe)]
    length = min(model.config.max_position_embeddings for model in models)
    words = parity.default_text() if text is None else parity.read_text(text)
    beyond = parity.length_beyond(open_source(dense).model.arch, tokens)
    ids = parity.rows_of(words, chosen, tokens, length, beyond)
    with progress("text") as show:
        found = parity.compare(models[0], models[1], ids, batch_size, show)
    if is_first_rank():
        why = _why(dense, moe) if weights and not found.exact else []
        _show_parity(found, why, f"{dense} → {moe}, {dtype}", json)
    harness.end()


@one_line_errors
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Argument(help="What to go on from.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens at most.", min=1)] = 64,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token each time.", min=0)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="For a temperature above 0.")] = 1234,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write it to as well.")
    ] = None,
    dtype: Dtype = None,
    tokenizer: Tokenizer = None,
    tp: TP = 1,
    pp: PP = 1,
    ep: EP = 1,
    etp: ETP = 1,
    ranks: Ranks = None,
) -> None:
    """Let a checkpoint go on from a text.

    \b
    Example:
      nemo-upcycle generate demo/e8t2_hf "def main():"
    """
    folding = folding_of(tp, pp, ep, etp)
    check_there(checkpoint)
    on_ranks(folding, ranks)

    import torch

    from nemo_upcycle.evaluation import harness
    from nemo_upcycle.evaluation.opening import is_first_rank, open_model, open_tokenizer

    chosen = open_tokenizer(tokenizer or checkpoint)
    model = open_model(checkpoint, folding, dtype)
    inputs = chosen(prompt, return_tensors="pt").to(model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature}
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        eos_token_id=chosen.eos_token_id,
        pad_token_id=chosen.eos_token_id,
        **sampling,
    )
    if is_first_rank():
        text = chosen.decode(output[0], skip_special_tokens=True)
        typer.echo(text)
        if out is not None:
            write_whole(out, text + "\n")
    harness.end()


def _show_scores(out: Path, models: dict[str, Any], paper: bool) -> None:
    from rich.console import Console

    from nemo_upcycle.evaluation.harness import write_results
    from nemo_upcycle.evaluation.scores import markdown, render

    files = [file for name in models for file in write_results(out, name, models[name])]
    names = ["checkpoint", "dense"][: len(models)]
    results = list(models.values())
    write_whole(out / "scores.md", markdown(names, results, paper))
    console = Console()
    for table in render(names, results, paper):
        console.print(table)
    for file in (out / "scores.md", *files):
        typer.echo(file)


def _why(dense: Path, moe: Path) -> list[str]:
    from nemo_upcycle.checkpoint import open_checkpoint
    from nemo_upcycle.checkpoint.branches import split_sources
    from nemo_upcycle.checkpoint.kept import dense_checkpoints_in
    from nemo_upcycle.evaluation.drift import drift
    from nemo_upcycle.evaluation.parity import reasons
    from nemo_upcycle.mapping import family_of
    from nemo_upcycle.trained import open_trained

    checkpoint, trained = open_checkpoint(str(dense)), open_trained(moe)
    with progress("weights") as show:
        found = drift(checkpoint, trained, show)
    arch = family_of(checkpoint.config).architecture(checkpoint.config)
    sources = dense_checkpoints_in(trained.checkpoint.directory) or ""
    return list(reasons(found, trained.model, arch, len(split_sources(sources or str(dense)))))


def _show_parity(found: "Parity", why: list[str], title: str, as_json: bool) -> None:
    import json
    from dataclasses import asdict

    if as_json:
        values = asdict(found) | {"exact": found.exact, "why": why}
        typer.echo(json.dumps(values))
        return
    verdict = "exact: the two compute the same but for rounding"
    if not found.exact:
        verdict = f"not exact: {'; '.join(why) or 'the logits differ'}"
    typer.echo(
        f"{title}, {found.tokens:,} tokens\n"
        f"  loss         {found.dense_loss:.6f} dense, {found.moe_loss:.6f} MoE\n"
        f"  KL           {found.kl:.3g} nats a token, from the dense model to the MoE\n"
        f"  top-1        {found.top1:.2%} of the predictions are the same\n"
        f"  logits       differ by {found.difference:.3g} at most; a token's by "
        f"{found.relative:.3g} of their norm\n"
        f"  rounding     alone makes {found.rounding:.3g} of that in the dense model, added up in "
        f"another order; up to {found.tolerance:.3g} is taken for rounding\n"
        f"  {verdict}"
    )

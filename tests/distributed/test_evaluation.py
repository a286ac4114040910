"""lm-eval on a NeMo checkpoint: the same on any ranks as on its export under transformers."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nemo_upcycle.cli import app
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.data.choices import write_choices
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.trained.export import export
from tests.distributed import scenarios
from tests.distributed.pool import RankPool, nemo_recipe
from tests.distributed.step0 import FOLDED
from tests.end_to_end import cli
from tests.tiny import tokens
from tests.workspace import make_workspace

pytest.importorskip("lm_eval")

TASK = "next_line"
LOGLIKELIHOOD_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Models:
    """Checkpoints of one model, and a task.

    Attributes:
        dense: Hugging Face directory with the tokenizer.
        step0: The MoE right after upcycling, saved by 2 ranks.
        trained: With all weights changed, saved by 4 ranks.
        exported: The latter as a Hugging Face directory.
        task: Directory of the task.
    """

    dense: Path
    step0: Path
    trained: Path
    exported: Path
    task: Path


@pytest.fixture(scope="module")
def models(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = make_workspace(tmp_path_factory.mktemp("evaluation"))
    dense, upcycling = root / "dense_hf", UpcyclingConfig(num_moe_experts=4)
    ranks.run(
        scenarios.upcycled_and_saved_as_nemo,
        2,
        dense=dense,
        folding=ParallelFolding(expert_model_parallel_size=2),
        upcycling=upcycling,
        directory=root / "step0",
    )
    ranks.run(
        scenarios.trained_and_saved,
        4,
        dense=dense,
        folding=FOLDED,
        upcycling=upcycling,
        directory=root / "trained",
        ids=tokens(rows=1, length=16),
    )
    export(root / "trained", root / "exported")
    corpora = [root / "data" / f"{name}.jsonl" for name in ("documentation", "sources")]
    write_choices(corpora, root / "task", TASK, items=500, held_out=1.0)
    return Models(dense, root / "step0", root / "trained", root / "exported", root / "task")


@nemo_recipe
def scores(
    source: Path, tokenizer: Path, task: Path, folding: ParallelFolding, limit: int
) -> dict[str, Any] | None:
    """Evaluate as the command does; return lm-eval's results on rank 0."""
    from nemo_upcycle.evaluation.harness import Options, evaluate
    from nemo_upcycle.evaluation.tasks import load_tasks, requests

    loaded = load_tasks(requests([TASK], None, False), task)
    options = Options(folding, 32, limit, tokenizer=str(tokenizer), log_samples=True)
    return next(iter(evaluate(source, loaded, options).values()), None)


def loglikelihoods(results: dict[str, Any]) -> torch.Tensor:
    samples = sorted(results["samples"][TASK], key=lambda sample: sample["doc_id"])
    return torch.tensor([[answer[0] for answer in s["filtered_resps"]] for s in samples])


def run(
    ranks: RankPool, models: Models, source: Path, world_size: int, folding: Any, limit: int
) -> dict[str, Any]:
    first, *others = ranks.run(
        scores,
        world_size,
        source=source,
        tokenizer=models.dense,
        task=models.task,
        folding=folding,
        limit=limit,
    )
    assert not any(others)
    return first


def check_equal(first: dict[str, Any], others: Sequence[dict[str, Any]], limit: int) -> None:
    expected = loglikelihoods(first)
    assert expected.shape == (limit, 4)
    assert expected.std() > 1, "all choices are alike"
    for other in others:
        difference = (loglikelihoods(other) - expected).abs().max()
        assert difference <= LOGLIKELIHOOD_TOLERANCE
        for metric in ("acc,none", "acc_norm,none"):
            assert other["results"][TASK][metric] == first["results"][TASK][metric]


ONE = ParallelFolding()
LIMITS = [20, pytest.param(500, marks=pytest.mark.slow)]


@pytest.mark.thorough
@pytest.mark.parametrize("limit", LIMITS)
def test_any_ranks_and_the_export_agree(ranks: RankPool, models: Models, limit: int) -> None:
    found = [
        run(ranks, models, source, world_size, folding, limit)
        for source, world_size, folding in (
            (models.exported, 1, ONE),
            (models.trained, 1, ONE),
            (models.trained, 4, FOLDED),
            (models.trained, 4, ParallelFolding(expert_model_parallel_size=2)),
            (models.exported, 2, ParallelFolding(pipeline_model_parallel_size=2)),
        )
    ]
    check_equal(found[0], found[1:], limit)


@pytest.mark.parametrize("limit", LIMITS)
def test_at_step_0_scores_are_the_dense_models(ranks: RankPool, models: Models, limit: int) -> None:
    dense = run(ranks, models, models.dense, 1, ONE, limit)
    moe = run(ranks, models, models.step0, 4, FOLDED, limit)
    spread = run(ranks, models, models.dense, 2, ParallelFolding(tensor_model_parallel_size=2), 20)
    check_equal(dense, [moe], limit)
    trained = run(ranks, models, models.trained, 1, ONE, limit)
    assert (loglikelihoods(trained) - loglikelihoods(dense)).abs().max() > 1
    assert (loglikelihoods(spread) - loglikelihoods(dense)[:20]).abs().max() <= 1e-4


LONG = "def parse(self, text): return [int(word) for word in text.split()]\n" * 40
REQUESTS: dict[str, list[tuple[Any, ...]]] = {
    "loglikelihood": [
        ("import os", "\nimport sys"),
        ("", "def main"),
        (LONG, " and then some"),  # truncated on the left
        ("x = ", "[1, 2, 3]\n" * 20),  # a continuation as long as the model's rows
    ],
    "loglikelihood_rolling": [("short",), (LONG,)],
    "generate_until": [
        ("def", {"until": ["\n\n"], "max_gen_toks": 24}),
        ("class Parser(Base):\n    def __init__", {"until": ["\n\n"], "max_gen_toks": 24}),
        (LONG, {"until": ["zzz"], "max_gen_toks": 8}),  # truncated on the left
        ("a, b = ", {"until": ["e"], "max_gen_toks": 24}),
        ("import", {"until": [], "max_gen_toks": 9, "do_sample": False}),
    ],
}


@nemo_recipe
def answers(source: Path, tokenizer: Path, folding: ParallelFolding) -> dict[str, list[Any]]:
    """Answer each kind of request."""
    from lm_eval.api.instance import Instance

    from nemo_upcycle.evaluation.lm import NemoUpcycleLM

    lm = NemoUpcycleLM(
        str(source),
        folding.tensor_model_parallel_size,
        folding.pipeline_model_parallel_size,
        folding.expert_model_parallel_size,
        tokenizer=str(tokenizer),
        batch_size=4,
    )
    return {
        kind: getattr(lm, kind)([Instance(kind, {}, args, i) for i, args in enumerate(asked)])
        for kind, asked in REQUESTS.items()
    }


@pytest.mark.thorough
def test_all_kinds_of_requests(ranks: RankPool, models: Models) -> None:
    """Against lm-eval's own model class over transformers, which says what truncation is."""
    options = {"tokenizer": models.dense}
    (expected,) = ranks.run(answers, 1, source=models.exported, folding=ONE, **options)
    assert len(set(expected["generate_until"])) > 3
    for found in [
        *ranks.run(answers, 1, source=models.trained, folding=ONE, **options),
        *ranks.run(answers, 4, source=models.trained, folding=FOLDED, **options),
    ]:
        assert found["generate_until"] == expected["generate_until"]
        for one, other in zip(found["loglikelihood"], expected["loglikelihood"], strict=True):
            assert one == (pytest.approx(other[0], abs=1e-3), other[1])
        assert found["loglikelihood_rolling"] == pytest.approx(
            expected["loglikelihood_rolling"], abs=1e-2
        )


@nemo_recipe
def refusal(**arguments: Any) -> str:
    """Return what is said of a mapping that does not fit."""
    from nemo_upcycle.evaluation.opening import open_model

    try:
        open_model(**arguments)
    except UpcyclingError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("folding", "dtype", "message"),
    [
        (ParallelFolding(tensor_model_parallel_size=2), None, "1 ranks do not divide"),
        (ONE, "int8", "expected one of: float32"),
    ],
)
def test_what_does_not_fit_is_refused(
    ranks: RankPool, models: Models, folding: ParallelFolding, dtype: str | None, message: str
) -> None:
    (said,) = ranks.run(refusal, 1, source=models.trained, folding=folding, dtype=dtype)
    assert message in said


def test_a_fault_on_one_rank_stops_all(ranks: RankPool, models: Models, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(models.exported, tmp_path / "damaged"))
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.3.block_sparse_moe.experts.2.w2.weight"][5, 5] = float("nan")
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    said = ranks.run(refusal, 4, source=damaged, folding=FOLDED, dtype=None)
    assert all("holds NaN or Inf" in each and "rank 3" in each for each in said), said


@nemo_recipe
def logits(source: Path, dtype: str, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of a checkpoint."""
    from nemo_upcycle.evaluation.opening import open_model

    return open_model(source, FOLDED, dtype)(ids).logits


def test_bf16(ranks: RankPool, models: Models) -> None:
    """Two implementations round differently: both are as far from fp32."""
    from transformers import AutoModelForCausalLM

    ids = tokens(rows=2, length=96, vocab_size=512)
    found = ranks.run(logits, 4, source=models.trained, dtype="bfloat16", ids=ids)
    assert all(torch.equal(each, found[0]) for each in found)
    exact, rounded = (
        AutoModelForCausalLM.from_pretrained(models.exported, dtype=dtype)(ids).logits.float()
        for dtype in (torch.float32, torch.bfloat16)
    )
    for one, other in ((found[0], rounded), (found[0], exact)):
        assert (one - other).norm() / other.norm() <= 2e-2


def test_results_are_lm_evals(ranks: RankPool, models: Models, tmp_path: Path) -> None:
    from nemo_upcycle.evaluation.harness import Written, read_results
    from nemo_upcycle.evaluation.scores import markdown
    from nemo_upcycle.evaluation.tasks import requests

    (request,) = requests([TASK], None, False)
    results = {request: run(ranks, models, models.trained, 1, ONE, 8)}
    written = Written(tmp_path)
    written.results("results", request, results[request])
    (path,) = written.files
    saved = json.loads(path.read_text())
    assert saved["results"][TASK]["acc,none"] == results[request]["results"][TASK]["acc,none"]
    assert saved["config"]["model_source"] == str(models.trained)
    again = read_results(path, [request])
    table = markdown(["checkpoint", "dense"], [results, again], paper=False)
    assert f"| {TASK} | 0 | acc |" in table
    assert "+0.0000" in table
    with pytest.raises(UpcyclingError, match="expected the tasks"):
        read_results(path, requests(["piqa"], None, False))


def test_the_command(models: Models, tmp_path: Path) -> None:
    """Ranks are started as for a user; only what counts is said."""
    said = cli.run(
        tmp_path,
        *("nemo-upcycle", "evaluate", str(models.step0), "--tasks", TASK, "--ep", "2"),
        *("--include-path", str(models.task), "--dense", str(models.dense), "--limit", "10"),
        *("--tokenizer", str(models.dense)),
    )
    assert "Traceback" not in said
    assert "Warning" not in said
    results, dense = (
        json.loads((tmp_path / "evaluation" / f"{name}.json").read_text())
        for name in ("results", "dense")
    )
    assert results["results"][TASK] == dense["results"][TASK]
    assert results["n-samples"][TASK]["effective"] == 10
    assert (tmp_path / "evaluation" / "scores.md").read_text().count("+0.0000") == 2


@pytest.mark.thorough
def test_what_is_missing_is_named(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    words = ("nemo-upcycle", "evaluate", str(models.step0), "--tasks", "piqa")
    said = cli.run(tmp_path, *words, forked=False)  # the import reads the environment
    (line,) = said.strip().splitlines()
    assert line.startswith("Error: A data set of piqa (of baber/piqa) is not on this machine")
    assert "TaskManager().load(['piqa'])" in line
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["CHECKPOINT"], "No task is named"),
        (["CHECKPOINT", "--tasks", "no_such_task"], "lm-eval has no task no_such_task"),
        (["CHECKPOINT", "--tasks", TASK, "--include-path", "nowhere"], "nowhere is no directory"),
        (["nowhere", "--tasks", TASK], "nowhere"),
        (["CHECKPOINT", "--tasks", TASK, "--tp", "2", "--ranks", "3"], "3 ranks do not divide"),
        (["CHECKPOINT", "--tasks", TASK, "--tp", "0"], "expected 1 or more"),
    ],
)
def test_bad_arguments(
    models: Models, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "TQDM_MININTERVAL"):
        monkeypatch.setenv(name, "1")  # what the command sets, undone afterwards
    words = [str(models.step0) if word == "CHECKPOINT" else word for word in arguments]
    result = CliRunner().invoke(app, ["evaluate", *words])
    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.slow
def test_lm_evals_own_command_line_knows_the_model(models: Models, tmp_path: Path) -> None:
    said = cli.run(
        tmp_path,
        *("python", "-m", "nemo_upcycle.evaluation.lm", "run", "--model", "nemo_upcycle"),
        *("--model_args", f"pretrained={models.step0},tokenizer={models.dense}"),
        *("--tasks", TASK, "--include_path", str(models.task), "--limit", "5"),
    )
    assert f"|{TASK}|" in said.replace(" ", "")
    assert "acc_norm" in said


def test_the_entry_point_is_the_registered_class() -> None:
    """lm-eval after 0.4.13 reads it; earlier ones know the class once it is imported."""
    from lm_eval.api.registry import get_model

    from nemo_upcycle.evaluation.lm import NemoUpcycleLM

    tomllib = pytest.importorskip("tomllib")  # Python 3.11's
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    entry = tomllib.loads(text)["project"]["entry-points"]["lm_eval.models"]["nemo_upcycle"]
    assert entry == f"{NemoUpcycleLM.__module__}:{NemoUpcycleLM.__name__}"
    assert get_model("nemo_upcycle") is NemoUpcycleLM


def test_table_3_has_the_papers_tasks_and_averages() -> None:
    """The averages are the paper's own."""
    from nemo_upcycle.evaluation.scores import markdown, paper_score
    from nemo_upcycle.evaluation.tasks import PAPER, requests

    wanted = requests([], None, paper=True)
    assert {(task, r.num_fewshot) for r in wanted for task in r.tasks} == {
        (row.task, row.num_fewshot) for row in PAPER
    }
    results = {
        request: {
            "results": {
                row.task: {f"{row.metric},none": row.moe / 100, f"{row.metric}_stderr,none": 0.01}
                for row in PAPER
                if row.num_fewshot == request.num_fewshot
            }
        }
        for request in wanted
    }
    assert all(paper_score(results, row) == pytest.approx(row.moe) for row in PAPER)
    lines = markdown(["checkpoint"], [results], paper=True).splitlines()
    assert "| MMLU, 5-shot | acc | 64.00 | 65.20 | 64.00 |" in lines
    assert "| average |  | 63.89 | 62.71 | 63.89 |" in lines

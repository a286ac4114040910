"""Run lm-eval on a checkpoint and write the results."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.data.encoder import encoder_of
from nemo_upcycle.engine.launch import is_first_rank
from nemo_upcycle.errors import UpcyclingError, listing
from nemo_upcycle.evaluation.scores import Results
from nemo_upcycle.evaluation.tasks import Request
from nemo_upcycle.files import write_whole


@dataclass(frozen=True)
class Options:
    """Options of an evaluation.

    Attributes:
        folding: Parallel mapping of the model over the ranks.
        batch_size: Rows per batch, over all ranks.
        limit: Maximum number of questions per task; None for all.
        dtype: The model's dtype; None means the checkpoint's.
        max_length: Maximum number of tokens per row; None means the model's context length.
        tokenizer: Directory of the tokenizer; None means the checkpoint's.
        log_samples: Whether to keep every question with its log-likelihoods.
        apply_chat_template: Whether to apply the tokenizer's chat template to questions.
    """

    folding: ParallelFolding = field(default_factory=ParallelFolding)
    batch_size: int = 8
    limit: int | None = None
    dtype: str | None = None
    max_length: int | None = None
    tokenizer: str | None = None
    log_samples: bool = False
    apply_chat_template: bool = False


Keep = Callable[[Request, Mapping[str, Any]], None]


def evaluate(
    source: str | Path,
    tasks: Mapping[Request, Any],
    options: Options,
    keep: Keep = lambda request, results: None,
) -> Results:
    """Evaluate a checkpoint; every rank must call this.

    Args:
        source: A checkpoint in NeMo 2's, Megatron-LM's or Hugging Face's format.
        tasks: Result of `load_tasks`.
        options: Options.
        keep: Called on rank 0 with each request and its results as soon as available.

    Returns:
        lm-eval's results on rank 0; empty elsewhere.

    Raises:
        UpcyclingError: The checkpoint cannot be read, or does not fit the parallel mapping.
    """
    from lm_eval import evaluator, simple_evaluate

    from nemo_upcycle.evaluation.lm import NemoUpcycleLM

    evaluator.get_git_commit_hash = _git_hash
    folding = options.folding
    lm = NemoUpcycleLM(
        str(source),
        folding.tensor_model_parallel_size,
        folding.pipeline_model_parallel_size,
        folding.expert_model_parallel_size,
        folding.expert_tensor_parallel_size,
        options.dtype,
        options.tokenizer,
        batch_size=options.batch_size,
        max_length=options.max_length,
    )
    by_request = {}
    for request, manager in tasks.items():
        results = simple_evaluate(
            model=lm,
            tasks=list(request.tasks),
            num_fewshot=request.num_fewshot,
            limit=options.limit,
            task_manager=manager,
            log_samples=options.log_samples,
            apply_chat_template=options.apply_chat_template,
            bootstrap_iters=100_000 if is_first_rank() else 0,
        )
        if results is not None and is_first_rank():
            results["config"] |= {
                "batch_size": options.batch_size,
                "max_length": lm.max_length,
                "apply_chat_template": options.apply_chat_template,
                "tokenizer": encoder_of(lm.tokenizer).fingerprint(),
            }
            by_request[request] = results
            keep(request, results)
    return by_request


def _git_hash() -> str | None:
    """Return the commit of the current directory; lm-eval lets git complain on the screen."""
    try:
        described = subprocess.run(
            ("git", "describe", "--always"), capture_output=True, text=True, check=False
        )
    except OSError:  # no git
        return None
    return described.stdout.strip() or None


def read_results(path: Path, wanted: Sequence[Request]) -> Results:
    """Read lm-eval's results of an earlier run, for requests with the same tasks and examples.

    Args:
        path: lm-eval's JSON file.
        wanted: Requests of the current run.

    Raises:
        UpcyclingError: The file has no results for the requests, or a task without a score.
    """
    try:
        saved = json.loads(path.read_text())
        shots = {task: saved["n-shot"].get(task) for task in saved["results"]}
        empty = [task for task, metrics in saved["results"].items() if not _has_score(metrics)]
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UpcyclingError(
            f"{path} cannot be read ({error!r}); expected lm-eval's JSON of an earlier run."
        ) from error
    by_request = {
        request: saved
        for request in wanted
        if any(
            task in shots and request.num_fewshot in (None, shots[task]) for task in request.tasks
        )
    }
    if not by_request:
        raise UpcyclingError(
            f"{path} has results of {', '.join(shots)}; expected the tasks that are run now, with "
            "as many examples."
        )
    groups = saved.get("group_subtasks") or {}  # some groups have no score
    if without := [task for task in empty if task not in groups]:
        raise UpcyclingError(
            f"{path} has no score of {listing(without)}; expected lm-eval's JSON of a run that "
            "came to its end."
        )
    return by_request


def _has_score(metrics: Mapping[str, Any]) -> bool:
    return any("," in name and isinstance(value, int | float) for name, value in metrics.items())


def check_options(path: Path, earlier: Results, options: Options) -> None:
    """Check, before evaluating, that earlier results were made with the same options.

    Args:
        path: File of the earlier results.
        earlier: Result of `read_results`.
        options: Options of the current run.

    Raises:
        UpcyclingError: The limit or the chat template option differs.
    """
    for results in earlier.values():
        limit = results.get("config", {}).get("limit")
        if "limit" in results.get("config", {}) and limit != options.limit:
            raise _other(path, "--limit", limit, options.limit)
        templated = _is_templated(results)
        if templated is not None and templated != options.apply_chat_template:
            raise _other(path, "--apply-chat-template", templated, options.apply_chat_template)


def check_alike(path: Path, earlier: Results, results: Results) -> None:
    """Check that two runs used the same questions and the same tokenizer.

    Args:
        path: File of the earlier results.
        earlier: Result of `read_results`.
        results: Results of the current run.

    Raises:
        UpcyclingError: Questions, task versions, shots or tokenizer differ.
    """
    for request, now in results.items():
        before = earlier.get(request, {})
        for key, name in (("n-samples", "questions"), ("versions", "version"), ("n-shot", "shots")):
            previous, current = before.get(key) or {}, now.get(key) or {}
            for task in sorted(previous.keys() & current.keys()):
                one, other = _asked(previous[task]), _asked(current[task])
                if one != other:
                    raise _other(path, f"{name} of {task}", one, other)
        one, other = (each.get("config", {}).get("tokenizer") for each in (before, now))
        if one and other and one != other:
            raise _other(path, "fingerprint of the tokenizer", one[:16], other[:16])


def _is_templated(results: Mapping[str, Any]) -> bool | None:
    """Return whether a chat template was applied; None if the results do not record this."""
    said = results.get("config", {}).get("apply_chat_template")
    if said is None and "chat_template" in results:  # written by lm-eval's own command line
        return bool(results["chat_template"])
    return said


def _asked(value: Any) -> Any:
    return value.get("effective") if isinstance(value, Mapping) else value


def _other(path: Path, what: str, before: Any, now: Any) -> UpcyclingError:
    return UpcyclingError(
        f"{path} has results with {what} {before}, and now it is {now}: they do not compare. "
        "Evaluate the dense model in the same way: --dense CHECKPOINT."
    )


class Written:
    """The files written by an evaluation, with fallbacks so that no result is lost.

    Args:
        out: Output directory, created if missing.
        several: Whether tasks are run with several numbers of examples.
    """

    def __init__(self, out: Path, several: bool = False) -> None:
        self.files: list[Path] = []
        self._out, self._several = out, several
        self._failures: list[str] = []

    def results(self, name: str, request: Request, results: Mapping[str, Any]) -> None:
        """Write lm-eval's results of a model: `NAME.json`, or `NAME-5-shot.json` for several runs.

        Args:
            name: Name of the model.
            request: The request.
            results: lm-eval's results.
        """
        from lm_eval.utils import handle_non_serializable

        shots = request.num_fewshot if self._several else None
        file = f"{name}.json" if shots is None else f"{name}-{shots}-shot.json"
        said = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        self.text(file, said)

    def text(self, name: str, content: str) -> None:
        """Write a file; if that fails, to a temporary directory, and as a last resort to stdout."""
        try:
            self._write(self._out, name, content)
        except OSError as error:
            try:
                elsewhere = Path(tempfile.mkdtemp(prefix="nemo-upcycle-evaluation-"))
                self._write(elsewhere, name, content)
                place = f"is in {elsewhere}"
            except OSError:
                print(content, file=sys.stdout, flush=True)
                place = "is printed above"
            self._failures.append(
                f"{self._out / name} could not be written ({error.strerror}); it {place}"
            )

    def _write(self, directory: Path, name: str, content: str) -> None:
        write_whole(directory / name, content)
        self.files.append(directory / name)

    def check(self) -> None:
        """Report failed writes at the end.

        Raises:
            UpcyclingError: A file could not be written to the output directory.
        """
        if self._failures:
            raise UpcyclingError("; ".join(self._failures) + ".")


def end() -> None:
    """Destroy the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

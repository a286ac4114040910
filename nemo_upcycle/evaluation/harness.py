"""Run lm-eval on a checkpoint and keep what it says."""

import json
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
    """How tasks are run.

    Attributes:
        folding: How a model is spread over the ranks.
        batch_size: Rows at a time, over all ranks.
        limit: Questions of each task at most; None for all.
        dtype: The model's; None takes the checkpoint's.
        max_length: Tokens of a row at most; None takes the model's.
        tokenizer: Directory of the tokenizer; None takes the checkpoint's.
        log_samples: Whether to keep every question with its log-likelihoods.
        apply_chat_template: Whether to ask in the tokenizer's chat template.
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
    """Evaluate a checkpoint; every rank must call it.

    Args:
        source: The checkpoint: NeMo 2, Megatron-LM or Hugging Face.
        tasks: From `load_tasks`.
        options: How.
        keep: Called on rank 0 with what was run and its results, as soon as they are there.

    Returns:
        lm-eval's results, on rank 0; empty elsewhere.

    Raises:
        UpcyclingError: The checkpoint cannot be read, or not be spread so.
    """
    from lm_eval import simple_evaluate

    from nemo_upcycle.evaluation.lm import NemoUpcycleLM

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


def read_results(path: Path, wanted: Sequence[Request]) -> Results:
    """Read lm-eval's results of an earlier run, where they are of the same tasks and examples.

    Raises:
        UpcyclingError: The file holds none, or a task without a score.
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
    groups = saved.get("group_subtasks") or {}  # some groups have no score of their own
    if without := [task for task in empty if task not in groups]:
        raise UpcyclingError(
            f"{path} has no score of {listing(without)}; expected lm-eval's JSON of a run that "
            "came to its end."
        )
    return by_request


def _has_score(metrics: Mapping[str, Any]) -> bool:
    return any("," in name and isinstance(value, int | float) for name, value in metrics.items())


def check_options(path: Path, earlier: Results, options: Options) -> None:
    """Check before the work that earlier results were asked for as those to come.

    Args:
        path: Their file.
        earlier: From `read_results`.
        options: How the tasks will be run.

    Raises:
        UpcyclingError: They were not.
    """
    for results in earlier.values():
        limit = results.get("config", {}).get("limit")
        if "limit" in results.get("config", {}) and limit != options.limit:
            raise _other(path, "--limit", limit, options.limit)
        templated = _is_templated(results)
        if templated is not None and templated != options.apply_chat_template:
            raise _other(path, "--apply-chat-template", templated, options.apply_chat_template)


def check_alike(path: Path, earlier: Results, results: Results) -> None:
    """Check that earlier results are of the same questions, asked in the same tokens.

    Raises:
        UpcyclingError: They are not.
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
    """Return whether questions were asked in a chat template; None where results do not say."""
    said = results.get("config", {}).get("apply_chat_template")
    if said is None and "chat_template" in results:  # of lm-eval's own command line
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
    """What of an evaluation is on disk; nothing is lost where it cannot be written.

    Args:
        out: Directory to write to; made where it is not.
        several: Whether tasks are run with several numbers of examples.
    """

    def __init__(self, out: Path, several: bool = False) -> None:
        self.files: list[Path] = []
        self._out, self._several = out, several
        self._failures: list[str] = []

    def results(self, name: str, request: Request, results: Mapping[str, Any]) -> None:
        """Write lm-eval's results of a model: `NAME.json`, or `NAME-5-shot.json` where runs differ.

        Args:
            name: What to call the model.
            request: What was run.
            found: lm-eval's results.
        """
        from lm_eval.utils import handle_non_serializable

        shots = request.num_fewshot if self._several else None
        file = f"{name}.json" if shots is None else f"{name}-{shots}-shot.json"
        said = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        self.text(file, said)

    def text(self, name: str, content: str) -> None:
        """Write a file; elsewhere where that fails, and to the terminal where that fails too."""
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
        """Say at the end what is elsewhere.

        Raises:
            UpcyclingError: Something is.
        """
        if self._failures:
            raise UpcyclingError("; ".join(self._failures) + ".")


def end() -> None:
    """Leave the process group, where there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

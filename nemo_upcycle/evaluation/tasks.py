"""lm-eval's tasks, loaded before any model, so that missing tasks and data are reported early."""

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nemo_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

HUB_TIMEOUT_S = 5.0

MAX_GEN_TOKS = 256
"""lm-eval's maximum number of generated tokens if a task sets none."""


@dataclass(frozen=True)
class PaperRow:
    """A column of Table 3 of arXiv 2412.09952.

    Attributes:
        name: Heading of the column.
        task: lm-eval's task.
        metric: The paper's metric: normalized where lm-eval offers that.
        num_fewshot: Examples before each question.
        dense: Score of Llama 3 8B, in %.
        moe: Score of E8T2, in %.
    """

    name: str
    task: str
    metric: str
    num_fewshot: int
    dense: float
    moe: float


PAPER = (
    PaperRow("MMLU, 5-shot", "mmlu", "acc", 5, 65.20, 64.00),
    PaperRow("MMLU, 0-shot", "mmlu", "acc", 0, 62.10, 64.10),
    # 44.01 is lm-eval's mc2 score of Llama 3 8B; mc1 is near 27.
    PaperRow("TruthfulQA", "truthfulqa_mc2", "acc", 0, 44.01, 44.22),
    PaperRow("PIQA", "piqa", "acc_norm", 0, 80.47, 78.62),
    PaperRow("SciQ", "sciq", "acc_norm", 0, 93.90, 97.00),
    PaperRow("LogiQA", "logiqa", "acc_norm", 0, 29.80, 30.11),
    PaperRow("BoolQ", "boolq", "acc", 0, 81.16, 88.23),
    PaperRow("OBQA", "openbookqa", "acc_norm", 0, 45.00, 44.80),
)
"""Source: arXiv 2412.09952, Table 3."""


@dataclass(frozen=True)
class Request:
    """Tasks that are run with the same number of examples.

    Attributes:
        tasks: Names of lm-eval's tasks, groups or tags.
        num_fewshot: Examples before each question; None means each task's default.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None


def requests(tasks: Sequence[str], num_fewshot: int | None, paper: bool) -> list[Request]:
    """Return the requests for the named tasks and for the paper's table.

    Raises:
        UpcyclingError: There is neither a task nor the paper's table.
    """
    requests = [Request(tuple(tasks), num_fewshot)] if tasks else []
    if paper:
        for shots in sorted({row.num_fewshot for row in PAPER}):
            names = tuple(row.task for row in PAPER if row.num_fewshot == shots)
            requests.append(Request(names, shots))
    if not requests:
        raise UpcyclingError(
            "No task is named; give --tasks piqa,sciq, say, or --paper for the paper's table. "
            "`lm_eval ls tasks` lists them."
        )
    return requests


def need_lm_eval() -> None:
    """Check early that lm-eval is installed.

    Raises:
        UpcyclingError: lm-eval is not installed.
    """
    if find_spec("lm_eval") is None:
        raise UpcyclingError("lm-eval is not installed: pip install 'nemo-upcycle[eval]'.")


def load_tasks(
    wanted: Sequence[Request], include_path: Path | None = None
) -> "dict[Request, TaskManager]":
    """Load tasks with their data sets.

    Args:
        wanted: The requests.
        include_path: Directory with additional task files.

    Returns:
        lm-eval's task manager per request, which returns these tasks without loading again.

    Raises:
        UpcyclingError: A task is unknown, or its data set is neither cached nor reachable.
    """
    if include_path is not None and not include_path.is_dir():
        raise UpcyclingError(
            f"{include_path} is no directory; expected one with lm-eval's task YAML files."
        )
    stay_offline_without_a_hub()
    names = [name for request in wanted for name in request.tasks]
    index = _index(names, include_path)
    unknown = [name for name in names if not index.match_tasks([name])]
    if unknown:
        broken = _unreadable(include_path) if include_path is not None else []
        raise UpcyclingError(
            f"lm-eval has no task {', '.join(unknown)}. `lm_eval ls tasks` lists its own; "
            "--include-path DIR adds the YAML files of a directory."
            + "".join(f" {each}" for each in broken)
        )
    loaded = {}
    for request in wanted:
        manager = loaded[request] = copy(index)
        try:
            tasks = index.load(list(request.tasks))
        except (OSError, ValueError) as error:  # includes the errors of `datasets`
            raise _missing(index, request, error) from error
        except Exception as error:  # a task file may raise anything
            raise _faulty(", ".join(request.tasks), "cannot be loaded", error) from error
        manager.load = lambda _, tasks=tasks: tasks
    return loaded


def _index(names: Sequence[str], include_path: Path | None) -> Any:
    """Index the tasks of a directory, plus lm-eval's own thousands only if needed."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if all(own.match_tasks([name]) for name in names):
            return own
    return TaskManager(include_path=include_path)


def check_tasks(
    loaded: "Mapping[Request, TaskManager]", length: int | None = None
) -> Iterator[str]:
    """Build each task's first question, so that errors are reported before a model is loaded.

    Args:
        loaded: Result of `load_tasks`.
        length: Tokens per row; None if unknown.

    Yields:
        Deviations of lm-eval from the request.

    Raises:
        UpcyclingError: A task has no question, cannot build one, or generates a full row.
    """
    for request, manager in loaded.items():
        for name, task in manager.load(list(request.tasks))["tasks"].items():
            shots, own = request.num_fewshot, task.config.num_fewshot
            if own == 0 and shots:
                yield f"{name} is asked without examples: its own num_fewshot of 0 counts"
            _check_task(name, task, own if own == 0 or shots is None else shots)
            _check_room(name, task, length)


def _check_task(name: str, task: Any, shots: int | None) -> None:
    try:
        first = next(iter(task.eval_docs), None)
        if first is not None and hasattr(task, "doc_to_prefix"):  # absent in old-style tasks
            context = task.fewshot_context(
                first, num_fewshot=shots or 0, gen_prefix=task.doc_to_prefix(first)
            )
            task.construct_requests(doc=first, ctx=context, metadata=(name, 0, 1))
    except Exception as error:  # a task file may raise anything
        what = f"cannot be asked with {shots} examples" if shots else "cannot be asked"
        raise _faulty(name, what, error) from error
    if first is None:
        raise UpcyclingError(f"The task {name} has no question; expected one at least.")


def _check_room(name: str, task: Any, length: int | None) -> None:
    if length is None or task.OUTPUT_TYPE != "generate_until":
        return
    made = (task.config.generation_kwargs or {}).get("max_gen_toks", MAX_GEN_TOKS)
    if made >= length:
        raise UpcyclingError(
            f"{name} lets the model make {made} tokens (max_gen_toks), of the {length} that a row "
            "has: no room is left for a question. Give a longer --max-length, or set max_gen_toks "
            "in the task."
        )


def _faulty(name: str, what: str, error: Exception) -> UpcyclingError:
    said = " ".join(str(error).split())
    return UpcyclingError(f"The task {name} {what}: {type(error).__name__}: {said}")


def _unreadable(directory: Path) -> list[str]:
    """Return the errors in a directory's YAML files, which lm-eval silently skips."""
    from lm_eval.tasks._yaml_loader import load_yaml

    problems = []
    for path in sorted(directory.glob("**/*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:
            problems.append(f"{path} cannot be read: {' '.join(str(error).split())}.")
    return problems


def _missing(manager: Any, request: Request, error: Exception) -> UpcyclingError:
    names = list(request.tasks)
    data = sorted(
        {
            str(entry.cfg["dataset_path"])
            for name, entry in manager.task_index.items()
            if name in names and entry.cfg and entry.cfg.get("dataset_path")
        }
    )
    named = f" (of {', '.join(data)})" if data else ""
    return UpcyclingError(
        f"A data set of {', '.join(names)}{named} is not on this machine: {error}. On a machine "
        f'that reaches the Hugging Face hub run: HF_HOME=DIR python -c "from lm_eval.tasks import '
        f'TaskManager; TaskManager().load({names})". Copy DIR here and set HF_HOME=DIR; or give a '
        "local task with --include-path."
    )


def stay_offline_without_a_hub() -> None:
    """Switch to offline mode if the hub is unreachable: each data set would be retried for 23 s.

    Must run before `datasets` is imported.
    """
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HF_HUB_OFFLINE")):
        return
    hub = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((hub.hostname or "", hub.port or 443), HUB_TIMEOUT_S).close()
    except OSError:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

"""lm-eval's tasks, loaded before any model is, so that what is missing is said at once."""

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
"""Tokens that lm-eval lets a model make at most where a task does not say."""


@dataclass(frozen=True)
class PaperRow:
    """A column of Table 3 of arXiv 2412.09952.

    Attributes:
        name: Its heading.
        task: lm-eval's task.
        metric: The paper's choice: normalised where lm-eval has it.
        num_fewshot: Examples before the question.
        dense: Llama 3 8B's score, in %.
        moe: E8T2's.
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
    # 44.01 is what lm-eval gives Llama 3 8B for mc2; mc1 is near 27.
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
        tasks: Names of lm-eval's, tasks, groups or tags.
        num_fewshot: Examples before each question; None takes each task's own.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None


def requests(tasks: Sequence[str], num_fewshot: int | None, paper: bool) -> list[Request]:
    """Return what to run: the tasks that are named, and those of the paper's table.

    Raises:
        UpcyclingError: Nothing is.
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
    """Say at once that lm-eval is missing.

    Raises:
        UpcyclingError: It is.
    """
    if find_spec("lm_eval") is None:
        raise UpcyclingError("lm-eval is not installed: pip install 'nemo-upcycle[eval]'.")


def load_tasks(
    wanted: Sequence[Request], include_path: Path | None = None
) -> "dict[Request, TaskManager]":
    """Load tasks with their data sets.

    Args:
        wanted: What to run.
        include_path: Directory of tasks of one's own.

    Returns:
        For each request lm-eval's task manager, which gives these tasks without loading again.

    Raises:
        UpcyclingError: A task is not known, or its data set is not here and cannot be reached.
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
        except (OSError, ValueError) as error:  # datasets' errors are of these
            raise _missing(index, request, error) from error
        except Exception as error:  # of whatever a task's file asks for
            raise _faulty(", ".join(request.tasks), "cannot be loaded", error) from error
        manager.load = lambda _, tasks=tasks: tasks
    return loaded


def _index(names: Sequence[str], include_path: Path | None) -> Any:
    """Look up the tasks of a directory, and lm-eval's own thousands if one is not among them."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if all(own.match_tasks([name]) for name in names):
            return own
    return TaskManager(include_path=include_path)


def check_tasks(
    loaded: "Mapping[Request, TaskManager]", length: int | None = None
) -> Iterator[str]:
    """Ask each task's first question, so that what is wrong is said before a model is loaded.

    Args:
        loaded: From `load_tasks`.
        length: Tokens of a row; None where it is not known.

    Yields:
        What lm-eval does otherwise than asked for.

    Raises:
        UpcyclingError: A task has no question, cannot ask one, or what it generates fills a row.
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
        if first is not None and hasattr(task, "doc_to_prefix"):  # not of lm-eval's old kind
            context = task.fewshot_context(
                first, num_fewshot=shots or 0, gen_prefix=task.doc_to_prefix(first)
            )
            task.construct_requests(doc=first, ctx=context, metadata=(name, 0, 1))
    except Exception as error:  # of whatever a task's file asks for
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
    """Return what is wrong with a directory's YAML files, which lm-eval passes over."""
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
    """Ask nothing of a hub that cannot be reached: it would be tried for 23 s, for each data set.

    Must run before `datasets` is imported.
    """
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HF_HUB_OFFLINE")):
        return
    hub = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((hub.hostname or "", hub.port or 443), HUB_TIMEOUT_S).close()
    except OSError:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

"""The items of lm-eval's tasks, which training data must not contain."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_upcycle.data.decontamination import Item
from nemo_upcycle.evaluation.tasks import load_tasks, need_lm_eval, requests
from nemo_upcycle.files import write_whole


def write_items(tasks: Sequence[str], out: Path, include_path: Path | None = None) -> int:
    """Write the questions of tasks, each with the right answer.

    Args:
        tasks: lm-eval's tasks, groups or tags.
        out: Output file, JSON lines.
        include_path: Directory with additional task files.

    Returns:
        The number of items.

    Raises:
        UpcyclingError: lm-eval is not installed, a task is unknown, or its data set is neither
            cached nor reachable.
    """
    need_lm_eval()
    (request,) = requests(tasks, None, paper=False)
    loaded = load_tasks([request], include_path)[request].load(list(tasks))["tasks"]
    items = [item for task in loaded.values() for item in _items_of(task)]
    write_whole(out, "".join(json.dumps(asdict(item)) + "\n" for item in items))
    return len(items)


def _items_of(task: Any) -> Iterator[Item]:
    for number, document in enumerate(task.eval_docs):
        asked, answer = task.doc_to_text(document), task.doc_to_target(document)
        choices = task.doc_to_choice(document) if task.config.doc_to_choice is not None else None
        if choices and isinstance(answer, int) and 0 <= answer < len(choices):
            answer = choices[answer]
        # If the choices are whole sentences, lm-eval's question is only an index.
        text = asked if isinstance(asked, str) else ""
        yield Item(task.config.task, number, f"{text} {answer}".strip())

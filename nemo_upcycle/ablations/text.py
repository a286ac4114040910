"""Text for a comparison, where none is given: of the installed packages, and questions on it."""

from collections.abc import Callable
from pathlib import Path

from nemo_upcycle.ablations.results import Workspace
from nemo_upcycle.checkpoint.tokenizer_directory import tokenizer_directory
from nemo_upcycle.data.choices import write_choices
from nemo_upcycle.data.manifest import Manifest
from nemo_upcycle.data.package_sample import KINDS, write_package_sample
from nemo_upcycle.data.paths import DataPath
from nemo_upcycle.data.preparation import Preparation, prepare
from nemo_upcycle.errors import UpcyclingError

ITEMS = 500
"""Questions of the task `next_line`."""


def own_text(
    dense: Path, directory: Path, workers: int, show: Callable[..., None], items: int = ITEMS
) -> Workspace:
    """Write the text of the installed packages, tokenize it, and make questions; or go on.

    Megatron's split holds out the last documents, and the questions are made from them. The weights
    of the corpora are their tokens: a training sees every text equally often.

    Args:
        dense: The dense checkpoint, with its tokenizer.
        directory: Directory of the text, created if missing.
        workers: Number of processes.
        show: Called with bytes read, bytes in total, and tokens.
        items: Number of questions.

    Raises:
        UpcyclingError: The checkpoint has no tokenizer, or there is too little text.
    """
    tokenizer = tokenizer_directory(str(dense))
    if tokenizer is None:
        raise UpcyclingError(
            f"{dense} has no tokenizer, which the text of the installed packages needs; expected "
            "one beside the weights, or --data with tokenized data."
        )
    files = {kind: directory / f"{kind}.jsonl" for kind in KINDS}
    if not all(file.is_file() for file in files.values()):
        write_package_sample(directory)
    manifests: dict[str, Manifest] = {}
    for kind, file in files.items():
        made = Preparation((str(file),), Path(tokenizer), directory / kind)
        manifests[kind] = prepare(made, workers, show)
    task = directory / "task" / "next_line.jsonl"
    if not task.is_file():
        write_choices(list(files.values()), task.parent, items=items)
    total = sum(each.tokens for each in manifests.values())
    paths = tuple(
        DataPath(str(directory / kind), round(each.tokens / total, 4))
        for kind, each in manifests.items()
    )
    return Workspace(directory, dense, paths, task)

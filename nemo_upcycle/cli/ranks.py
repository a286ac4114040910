"""Options of commands that run a model: the parallel mapping, and the ranks."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemo_upcycle.cli.tools import ERRORS, hand_over

if TYPE_CHECKING:
    from nemo_upcycle.config import ParallelFolding

COMMANDS = ("evaluate", "verify", "generate", "check")
_MAPPING = "Parallel mapping"
TP = Annotated[int, typer.Option("--tp", "--tensor-model-parallel-size", rich_help_panel=_MAPPING)]
PP = Annotated[
    int, typer.Option("--pp", "--pipeline-model-parallel-size", rich_help_panel=_MAPPING)
]
EP = Annotated[int, typer.Option("--ep", "--expert-model-parallel-size", rich_help_panel=_MAPPING)]
ETP = Annotated[
    int, typer.Option("--etp", "--expert-tensor-parallel-size", rich_help_panel=_MAPPING)
]
Ranks = Annotated[
    int | None,
    typer.Option(
        help="Ranks to start on this machine. Default: as few as the mapping needs. Under torchrun "
        "or srun no ranks are started.",
        rich_help_panel=_MAPPING,
        show_default=False,
    ),
]


def folding_of(tp: int, pp: int, ep: int, etp: int) -> "ParallelFolding":
    """Return the mapping of the options."""
    from nemo_upcycle.config import ParallelFolding

    return ParallelFolding.of(tp=tp, pp=pp, ep=ep, etp=etp)


def check_there(*sources: Path | None) -> None:
    """Check all that can be checked before ranks are started and NeMo is imported."""
    from nemo_upcycle.checkpoint import is_checkpoint
    from nemo_upcycle.checkpoint.foreign import no_checkpoint
    from nemo_upcycle.checkpoint.run_directory import resolve_trained

    for source in sources:
        if source is not None and not is_checkpoint(directory := resolve_trained(source)):
            raise no_checkpoint(directory)


def on_ranks(folding: "ParallelFolding", ranks: int | None) -> None:
    """Continue as one of several ranks, or start the ranks, wait, and exit with their exit code."""
    from nemo_upcycle.engine.launch import fewest_ranks, launched

    count = ranks or fewest_ranks(folding)
    if not launched():
        folding.validate(count)
    on_this_many(count)


def on_this_many(count: int) -> None:
    """Continue as one of `count` ranks; see `on_ranks`."""
    from nemo_upcycle.engine.launch import launch, launched

    if count > 1 and not launched():
        command = next(n for n, word in enumerate(sys.argv) if word in COMMANDS)
        hand_over()
        raise typer.Exit(launch(sys.argv[command:], count, ERRORS))
    if int(os.environ.get("RANK", "0")):
        os.environ["TQDM_DISABLE"] = "1"
    elif not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")

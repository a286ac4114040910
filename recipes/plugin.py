"""What NeMo-Run loads: recipes, executors and the commands of `nemo upcycle`."""

import nemo_run as run
import typer
from nemo_run.cli.api import Entrypoint
from nemo_upcycle_recipes import (
    executors,
    llama3_8b_e8t2,
    llama31_70b_e8t2,
    llama32_1b_e8t2,
    llama32_3b_e8t2,
    llama_tiny,
    mistral_7b_e8t2,
    qwen25_7b_e8t2,
    upcycled_gpt,
)

from nemo_upcycle.cli import app
from nemo_upcycle.cli.interrupt import listen

__all__ = [
    "executors",
    "llama3_8b_e8t2",
    "llama31_70b_e8t2",
    "llama32_1b_e8t2",
    "llama32_3b_e8t2",
    "llama_tiny",
    "mistral_7b_e8t2",
    "qwen25_7b_e8t2",
    "upcycled_gpt",
]


class Commands(Entrypoint):
    """The commands of `nemo-upcycle`, under `nemo upcycle`."""

    def cli(self, parent: typer.Typer) -> None:
        """Add the commands to NeMo-Run's `upcycle` group."""
        parent.info.help = app.info.help
        parent.registered_commands += app.registered_commands
        parent.registered_groups += app.registered_groups


@run.cli.entrypoint(namespace="upcycle", entrypoint_cls=Commands)
def commands() -> None:
    """Stand for all commands; NeMo-Run asks it for them by `Commands.cli`."""


listen()

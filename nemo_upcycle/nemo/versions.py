"""Refuse versions beside NeMo with which `nemo.collections.llm` silently lacks `pretrain`."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from nemo_upcycle.errors import UpcyclingError

LIGHTNING = "2.4.0"
"""The newest version that nemo-toolkit 2.7.3 allows."""


def check_lightning(loggers: Any) -> None:
    """Check that Lightning has what NeMo imports from it.

    Args:
        loggers: The module `lightning.pytorch.loggers`.

    Raises:
        UpcyclingError: `NeptuneLogger` is missing, as from Lightning 2.6 on.
    """
    if not hasattr(loggers, "NeptuneLogger"):
        raise UpcyclingError(
            f"Lightning {_installed('lightning')} has no NeptuneLogger, which nemo-toolkit 2.7.3 "
            "imports; nemo.collections.llm would have no `pretrain`. Expected Lightning "
            f"{LIGHTNING}, the newest that nemo-toolkit allows: pip install "
            f"'lightning=={LIGHTNING}'."
        )


def check_pretrain(llm: Any) -> None:
    """Check that NeMo's LLM collection was imported whole.

    Args:
        llm: The module `nemo.collections.llm`.

    Raises:
        UpcyclingError: `pretrain` is missing, because something that the collection imports is.
            NeMo only logs the reason.
    """
    if hasattr(llm, "pretrain"):
        return
    try:
        import_module(f"{llm.__name__}.api")
        reason = "its import stopped"
    except ImportError as error:
        reason = str(error)
    raise UpcyclingError(
        f"{llm.__name__} has no `pretrain`: {reason}. Expected the packages of "
        "`pip install 'nemo-upcycle[nemo]'`, in the versions of constraints.txt."
    )


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of this environment"

"""Commands from a process that has imported NeMo already: each is a fork of it.

Importing NeMo takes 10 to 16 s, most of what a light command takes. The process is itself a fork of
the one from which the tests' ranks come. What the command does from there on is the same; `cli.run`
starts it as a user does unless the command is to be forked.
"""

import atexit
import contextlib
import gc
import multiprocessing
import os
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.distributed.pool import forks


class Zygote:
    """A process that forks one command at a time."""

    def __init__(self, environment: dict[str, str]) -> None:
        context = forks()
        self._connection, theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, environment)).start()
        theirs.close()
        atexit.register(self._connection.close)  # at which the process ends

    def run(self, directory: Path, words: tuple[str, ...]) -> str:
        """Run a command in a directory; return what it printed."""
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "output"
            self._connection.send((directory, words, output))
            self._connection.recv()
            return output.read_text()


@cache
def zygote() -> Zygote:
    """Return the one process of this test session."""
    from tests.end_to_end.cli import environment

    return Zygote(environment())


def _serve(connection: Connection, environment: dict[str, str]) -> None:
    os.environ |= environment
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    import nemo_run.__main__

    from nemo_upcycle.cli import nemo_run as plugin
    from tests import imported

    assert imported and nemo_run.__main__ and plugin
    if find_spec("lm_eval"):  # which `evaluate` needs
        import lm_eval
        import lm_eval.models.huggingface

        assert lm_eval
    gc.freeze()  # no garbage collection of a command looks at the imported
    context: Any = multiprocessing.get_context("fork")
    with contextlib.suppress(EOFError):
        while True:
            process = context.Process(target=_command, args=connection.recv())
            process.start()
            process.join()
            connection.send(process.exitcode)


def _command(directory: Path, words: tuple[str, ...], output: Path) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
    os.chdir(directory)
    sys.argv = list(words)
    if words[0] == "nemo":
        from nemo_run.cli.api import create_cli

        create_cli()()
    else:
        from nemo_upcycle.cli import main

        main()

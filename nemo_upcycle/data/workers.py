"""Worker processes that tokenize parts."""

import multiprocessing
import os
import queue
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_upcycle.data.decontamination import read_items
from nemo_upcycle.data.documents import Part
from nemo_upcycle.data.encoder import Encoder
from nemo_upcycle.data.parts import Advance, PartFiles, tokenize_part
from nemo_upcycle.data.selection import Selection
from nemo_upcycle.errors import UpcyclingError

SECONDS_BETWEEN_LOOKS = 0.2

_state: dict[str, Any] = {}
"""A worker's state: encoder, evaluation items, progress queue and the parent's process id."""


def tokenize_parts(
    tasks: Sequence[tuple[Part, PartFiles]],
    selection: Selection,
    encoder: Encoder,
    workers: int,
    advance: Advance,
    evaluations: Path | None = None,
) -> None:
    """Tokenize parts in worker processes.

    Args:
        tasks: Parts, each with the files to write.
        selection: Which records are documents, and which part of a record is the text.
        encoder: Encoder from texts to tokens.
        workers: Number of processes.
        advance: Called in this process with the increments of all workers.
        evaluations: File of evaluation items; documents that overlap an item are left out.

    Raises:
        UpcyclingError: A source cannot be read to the end, or a process was killed. After a read
            error, parts that other processes have begun are completed.
    """
    context = multiprocessing.get_context("spawn")
    told, before = context.Queue(), multiprocessing.active_children()
    given = encoder, evaluations, told, os.getpid()
    with ProcessPoolExecutor(min(workers, len(tasks)), context, _begin, given) as pool:
        with without_interrupts():
            futures = {pool.submit(_work, part, files, selection) for part, files in tasks}
        try:
            while futures:
                done, futures = wait(futures, SECONDS_BETWEEN_LOOKS, "FIRST_COMPLETED")
                _pass_on(told, advance)
                _raise_first(done)
        except BrokenProcessPool:
            raise UpcyclingError(
                "A process that tokenizes was killed, perhaps for the memory it took: give fewer "
                "--workers. Parts that are complete are kept, and the same command goes on."
            ) from None
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                if process not in before:
                    process.kill()
            raise
        finally:
            for future in futures:
                future.cancel()
    _pass_on(told, advance)


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Block Ctrl-C in new processes, which would each print a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(encoder: Encoder, evaluations: Path | None, told: Any, parent: int) -> None:
    # The worker processes already occupy all cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _state.update(
        encoder=encoder,
        evaluations=evaluations and read_items(evaluations),
        told=told,
        parent=parent,
    )


def _work(part: Part, files: PartFiles, selection: Selection) -> None:
    def advance(more_bytes: int, more_tokens: int) -> None:
        if os.getppid() != _state["parent"]:  # the parent was killed
            os._exit(1)
        _state["told"].put((more_bytes, more_tokens))

    tokenize_part(part, files, selection, _state["encoder"], advance, _state["evaluations"])


def _pass_on(told: Any, advance: Advance) -> None:
    while True:
        try:
            advance(*told.get_nowait())
        except queue.Empty:
            return


def _raise_first(done: set[Future[None]]) -> None:
    for future in done:
        future.result()

"""Processes that tokenise parts."""

import multiprocessing
import os
import queue
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from nemo_upcycle.data.decontamination import read_items
from nemo_upcycle.data.documents import Part
from nemo_upcycle.data.encoder import Encoder
from nemo_upcycle.data.parts import Advance, PartFiles, tokenize_part
from nemo_upcycle.data.selection import Selection

SECONDS_BETWEEN_LOOKS = 0.2

_state: dict[str, Any] = {}
"""What a worker has: what makes tokens, the queue that it tells its progress, who started it."""


def tokenize_parts(
    tasks: Sequence[tuple[Part, PartFiles]],
    selection: Selection,
    encoder: Encoder,
    workers: int,
    advance: Advance,
    evaluations: Path | None = None,
) -> None:
    """Tokenise parts in processes.

    Args:
        tasks: Parts, and where they are written.
        selection: What of a record is a document.
        encoder: Makes tokens.
        workers: Processes.
        advance: Told of all that they do, in this process.
        evaluations: Items whose documents are left out.

    Raises:
        UpcyclingError: A source cannot be read to its end; what other processes have begun is
            brought to its end.
    """
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    with ProcessPoolExecutor(
        min(workers, len(tasks)), context, _begin, (encoder, evaluations, told, os.getpid())
    ) as pool:
        futures = {pool.submit(_work, part, files, selection) for part, files in tasks}
        try:
            while futures:
                done, futures = wait(futures, SECONDS_BETWEEN_LOOKS, "FIRST_COMPLETED")
                _pass_on(told, advance)
                _raise_first(done)
        finally:
            for future in futures:
                future.cancel()
    _pass_on(told, advance)


def _begin(encoder: Encoder, evaluations: Path | None, told: Any, parent: int) -> None:
    # There are as many processes as cores already.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _state.update(
        encoder=encoder,
        evaluations=evaluations and read_items(evaluations),
        told=told,
        parent=parent,
    )


def _work(part: Part, files: PartFiles, selection: Selection) -> None:
    def advance(more_bytes: int, more_tokens: int) -> None:
        if os.getppid() != _state["parent"]:  # it was killed, and nobody waits for this
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

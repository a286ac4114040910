"""Processes that compute the lanes of a layer."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

from nemo_upcycle.calibration.lanes import Lane, Work, compute
from nemo_upcycle.data.workers import without_interrupts
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.files import end_with

if TYPE_CHECKING:
    from typing_extensions import Self

_SECONDS_BETWEEN_LOOKS = 0.5


class Processes:
    """Processes that compute lanes: this one, or others.

    Args:
        count: Number of processes; 1 is this one.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Self":
        if self._count > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._count, context, end_with, (os.getpid(),))
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()) if kind else []:
                process.kill()
            self._pool.shutdown(cancel_futures=True)

    def compute(
        self, work: Work, layer: int, lanes: Sequence[Lane], show: Callable[[int], None]
    ) -> None:
        """Compute a layer for all lanes.

        Raises:
            UpcyclingError: The checkpoint cannot be read, or a process was killed.
        """

        def look() -> None:
            show(sum(lane.tokens for lane in lanes if work.sums(layer, lane).exists()))

        if self._pool is None:
            compute(work, layer, lanes, done=look)
            return
        try:
            with without_interrupts():
                futures = {
                    self._pool.submit(compute, work, layer, lanes[number :: self._count], number)
                    for number in range(self._count)
                }
            while futures:
                done, futures = wait(futures, _SECONDS_BETWEEN_LOOKS, "FIRST_COMPLETED")
                for future in done:
                    future.result()
                look()
        except BrokenProcessPool:
            raise UpcyclingError(
                "A process that calibrates was killed, perhaps for the memory it took: give fewer "
                "--processes. What is complete is kept, and the same command goes on."
            ) from None

"""Communication between all ranks during upcycling, on a group that notices lost ranks."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch

from nemo_upcycle.errors import UpcyclingError

T = TypeVar("T")

TIMEOUT_S = 1800.0
"""How long a rank waits for the others; torch's default for gloo."""


def _said(error: Exception) -> str:
    """Return an error's message, with the type for errors that are not ours."""
    if isinstance(error, UpcyclingError):
        return str(error)
    return f"{type(error).__name__}: {error}"


class Ranks:
    """All ranks of the run, on a separate gloo group.

    A GPU run's NCCL group neither times out nor fails when a rank dies: the other ranks would wait
    in a kernel.

    Args:
        timeout_s: Seconds that a rank waits for the slowest rank.

    Raises:
        UpcyclingError: A rank was lost before all ranks arrived here.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self.timeout = timedelta(seconds=timeout_s)
        self.size, self.rank, self._group = 1, 0, None
        if torch.distributed.is_initialized():
            self.size = torch.distributed.get_world_size()
            self.rank = torch.distributed.get_rank()
        if self.size > 1:
            try:
                self._group = torch.distributed.new_group(backend="gloo", timeout=self.timeout)
            except RuntimeError as error:
                raise self._lost(error) from error

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order, on every rank.

        Raises:
            UpcyclingError: A rank was lost, or did not arrive within the timeout.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            # Waits for the slowest rank; rank 0 can name a rank that does not arrive.
            torch.distributed.monitored_barrier(self._group, self.timeout, wait_all_ranks=True)
            torch.distributed.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise self._lost(error) from error
        return values

    def raise_on_all(self, error: Exception | None) -> None:
        """Raise on every rank if any rank failed, so that no rank waits for a failed rank.

        Args:
            error: This rank's error, or None.

        Raises:
            UpcyclingError: Some rank failed; the message has the ranks and their errors.
        """
        said = _said(error) if error else None
        try:
            messages = self.gather(said)
        except UpcyclingError as lost:
            raise UpcyclingError(f"{said} ({lost})" if said else str(lost)) from error or lost
        by_message: dict[str, list[int]] = {}
        for rank, message in enumerate(messages):
            if message:
                by_message.setdefault(message, []).append(rank)
        if not by_message:
            return
        if len(by_message) == 1 and len(next(iter(by_message.values()))) == self.size:
            raise UpcyclingError(next(iter(by_message))) from error
        parts = [f"rank {','.join(map(str, ranks))}: {text}" for text, ranks in by_message.items()]
        raise UpcyclingError("; ".join(parts)) from error

    def on_all(self, work: Callable[[], T]) -> T:
        """Do this rank's work; raise on every rank if any rank has failed.

        Args:
            work: The work of this rank.

        Returns:
            The result of this rank.

        Raises:
            UpcyclingError: As `raise_on_all`.
        """
        done: list[T] = []
        error = None
        try:
            done.append(work())
        except Exception as exception:  # the other ranks must learn of any failure
            error = exception
        self.raise_on_all(error)
        return done[0]

    def _lost(self, error: RuntimeError) -> UpcyclingError:
        named = re.search(r"Ranks ([\d, ]+) failed to pass", str(error))
        who = "another rank (rank 0 says which, unless it is rank 0)"
        if named or self.size == 2:
            who = f"rank {named[1] if named else 1 - self.rank}"
        return UpcyclingError(
            f"Rank {self.rank} got no answer from {who}, which has ended, was killed, or took more "
            f"than {self.timeout.total_seconds():g} s longer. Check the last output of that rank, "
            "and whether its machine ran out of memory; then start the same command again. If "
            "ranks are only slow, raise timeout_s."
        )


def check_same(what: str, views: Sequence[str | None]) -> None:
    """Check that all nodes see the same files.

    Args:
        what: What is compared, for the message.
        views: What each rank sees, in rank order; the same list on all ranks.

    Raises:
        UpcyclingError: Ranks see different files.
    """
    first = {view: rank for rank, view in reversed(list(enumerate(views)))}
    if len(first) > 1:
        seen = "; ".join(f"rank {rank}: {view}" for view, rank in sorted(first.items(), key=str))
        raise UpcyclingError(
            f"Ranks see different {what} ({seen}); expected the same on all nodes."
        )


@contextmanager
def said_on_every_rank(prefix: str) -> Iterator[None]:
    """Print an error on a separate line on every rank.

    The launcher may end the other ranks before they have printed tracebacks.
    """
    try:
        yield
    except UpcyclingError as error:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        print(f"{prefix} rank {rank}: {error}", file=sys.stderr, flush=True)
        raise

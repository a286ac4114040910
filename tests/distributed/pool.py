"""Processes that stay alive between tests: importing NeMo takes each of them 10 s.

Where NeMo is not installed, the processes run Megatron-Core alone.

`RankPool.run(function, world_size, **kwargs)` calls `function(**kwargs)` on ranks 0 to
world_size - 1 of a real gloo process group and returns what each one returned.
"""

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from tests import progress

HAS_NEMO = find_spec("nemo") is not None


AFTER_FAILURE_S = 20.0
"""Once a rank has failed, ranks that do nothing for so many seconds wait for that rank."""


class RankError(AssertionError):
    """A rank raised; the message is its traceback."""


class RankPool:
    """Up to `size` ranks, started at the first call; each calls `prepare` before all else."""

    def __init__(self, size: int = 4, prepare: Callable[[], None] | None = None) -> None:
        self.size = size
        self._prepare = prepare
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], world_size: int, **kwargs: Any) -> list[Any]:
        """Call `function(**kwargs)` on every rank; return the results in rank order.

        Raises:
            RankError: A rank raised, died, or all of them hang.
        """
        self._start()
        with tempfile.TemporaryDirectory() as directory:
            for rank, (_, connection) in enumerate(self._ranks[:world_size]):
                connection.send((function, kwargs, rank, world_size, f"{directory}/store"))
            answers = self._answers(world_size)
        failures = [f"rank {rank}: {text}" for rank, (ok, text) in answers.items() if not ok]
        if failures:
            raise RankError("\n".join(failures))
        return [answers[rank][1] for rank in range(world_size)]

    def _answers(self, world_size: int) -> dict[int, tuple[bool, Any]]:
        """Return whether each rank has returned, and what, or why not."""
        answers: dict[int, tuple[bool, Any]] = {}
        is_whole = True
        waited = {self._ranks[rank][1]: rank for rank in range(world_size)}
        while waited:
            # A rank that waits for one that has failed does nothing, but may do so for long.
            quiet_s = progress.QUIET_S if all(ok for ok, _ in answers.values()) else AFTER_FAILURE_S
            pids = [self._ranks[rank][0].pid for rank in waited.values()]
            if not progress.wait(partial(wait, list(waited)), pids, quiet_s):
                problem = False, "no answer, and no rank does anything"
                answers |= dict.fromkeys(waited.values(), problem)
                break
            for connection in wait(list(waited), timeout=0):
                try:
                    answers[waited[connection]] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    answers[waited[connection]] = False, "the process died"
                    is_whole = False
                del waited[connection]
        if waited or not is_whole:
            self.stop()
        return answers

    def _start(self) -> None:
        # What comes before all else comes before the import that the others share.
        context = multiprocessing.get_context("spawn") if self._prepare else forks()
        while len(self._ranks) < self.size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self._prepare), daemon=False)
            process.start()
            self._ranks.append((process, ours))

    def stop(self) -> None:
        """End all processes."""
        for _, connection in self._ranks:
            connection.close()  # at which a rank that is well ends itself and what it started
        for process, _ in self._ranks:
            process.join(timeout=10)
            process.kill()
            process.join()
        self._ranks.clear()


def forks() -> BaseContext:
    """Return the context whose processes are forks of one that has imported NeMo."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.imported"])
    return context


def _serve(connection: Connection, prepare: Callable[[], None] | None) -> None:
    # NeMo says much as it is imported; what a test must know comes back through the pipe.
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    if prepare is not None:
        prepare()
    from tests import imported

    if HAS_NEMO:
        from nemo_upcycle.nemo import cpu
    else:
        from nemo_upcycle.engine import cpu

    assert imported
    cpu.enable()
    while True:
        try:
            function, kwargs, rank, world_size, store = connection.recv()
        except EOFError:
            return
        try:
            answer = True, _call(function, kwargs, rank, world_size, store)
        except BaseException:
            answer = False, traceback.format_exc()
        # As bytes: a connection would hand tensors over by shared memory, which outlives no call.
        connection.send_bytes(pickle.dumps(answer))


def nemo_recipe(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function that runs a NeMo recipe, which makes the process group itself."""
    function.runs_nemo = True  # type: ignore[attr-defined]
    return function


def _call(
    function: Callable[..., Any], kwargs: dict[str, Any], rank: int, world_size: int, store: str
) -> Any:
    import torch

    try:
        if not hasattr(function, "runs_nemo"):
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
            )
        else:
            pretend_torchrun(rank, world_size, Path(store))
        result = function(**kwargs)
        _meet(Path(store), rank, world_size)
        return result
    finally:
        _ended(Path(store), rank).touch()  # the others do not wait for one that has failed
        _forget()


def _meet(store: Path, rank: int, world_size: int) -> None:
    """Wait until all ranks have ended: a connection that one closes may be new to another."""
    _ended(store, rank).touch()
    seconds = 0.005
    while not all(_ended(store, other).exists() for other in range(world_size)):
        time.sleep(seconds)
        seconds = min(2 * seconds, 0.1)  # a wait for ever must not look like work


def _ended(store: Path, rank: int) -> Path:
    return store.with_suffix(f".ended-{rank}")


def pretend_torchrun(rank: int, world_size: int, store: Path) -> None:
    """Set what torchrun sets; rank 0 finds a free port and tells the others."""
    if rank == 0:
        with socket.create_server(("127.0.0.1", 0)) as server:
            partial = store.with_suffix(".partial")
            partial.write_text(str(server.getsockname()[1]))
        partial.rename(store)
    while not store.exists():
        time.sleep(0.01)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.read_text(),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
    }


def destroy_groups() -> None:
    """Destroy all process groups but that of all ranks; each has threads that keep polling.

    Megatron only forgets the groups of a mapping. After 30 mappings, 1,700 threads would poll.
    """
    import torch.distributed as dist

    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _forget() -> None:
    """Undo what Megatron and NeMo keep in the process."""
    import torch

    from nemo_upcycle.check.process_groups import forget_megatron

    if HAS_NEMO:
        from nemo.utils import AppState
        from nemo.utils.metaclasses import Singleton

        Singleton._Singleton__instances.pop(AppState, None)  # type: ignore[attr-defined]
    forget_megatron()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # Ranks of which one did not get as far would wait for groups of other names.
    torch.distributed.distributed_c10d._world.group_count = 0

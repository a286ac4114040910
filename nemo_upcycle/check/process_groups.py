"""The ranks of a check: joining and leaving, and the process groups that Megatron makes."""

import gc
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import count

import torch
from megatron.core import num_microbatches_calculator, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.engine import cpu
from nemo_upcycle.engine.launch import launched
from nemo_upcycle.engine.ranks import Ranks
from nemo_upcycle.plans.groups import rank_groups

MINUTES = 10
"""How long a collective may take before the ranks count as hanging."""


def device() -> torch.device:
    """Return this rank's device."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare_process() -> None:
    """Choose this rank's GPU; without a GPU, let Megatron run on CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        cpu.enable()


def _next_store() -> torch.distributed.Store:
    """Return a part of its own of the store that the launcher's ranks share."""
    store, jobs = _shared_store(os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"))
    return torch.distributed.PrefixStore(f"check-{next(jobs)}", store)


@cache
def _shared_store(*_: str | None) -> tuple[torch.distributed.Store, Iterator[int]]:
    """Return the store at an address, and the numbers of the jobs that use it."""
    if not launched():
        return torch.distributed.HashStore(), count()
    store, _rank, _size = next(torch.distributed.rendezvous("env://"))
    return store, count()


@contextmanager
def job(alone: bool = False) -> Iterator[None]:
    """Join the ranks that the launcher has started, and leave at the end; every rank must.

    A process can join several times, so that one broken mapping does not break the next.

    Args:
        alone: Be the only rank of a job instead.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    store = torch.distributed.HashStore() if alone else _next_store()
    if alone:
        rank, size = 0, 1
    torch.distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(minutes=MINUTES),
    )
    try:
        yield
        if not alone:
            _meet(store, rank, size)
    finally:
        forget_megatron()
        torch.distributed.destroy_process_group()
        # Ranks of which one did not get as far would wait for groups of other names.
        torch.distributed.distributed_c10d._world.group_count = 0


def patient() -> Ranks:
    """Return the ranks of the job, on a group of its own."""
    return Ranks(60.0 * MINUTES)


def _meet(store: torch.distributed.Store, rank: int, size: int) -> None:
    """Wait until all ranks are here: a connection that one closes may be new to another."""
    store.set(f"left-{rank}", "")
    store.wait([f"left-{other}" for other in range(size)], timedelta(minutes=MINUTES))


def shared_port() -> int:
    """Return a port that is free on rank 0's machine, the same on all ranks of the job."""
    found = [0]
    if torch.distributed.get_rank() == 0:
        with socket.create_server(("", 0)) as server:
            found = [server.getsockname()[1]]
    torch.distributed.broadcast_object_list(found, device=device())
    return found[0]


def make_groups(folding: ParallelFolding) -> None:
    """Make Megatron's process groups for a mapping, in place of those that there are."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        **folding.parallel_sizes, distributed_timeout_minutes=MINUTES
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)


def groups_of_rank() -> dict[str, tuple[int, ...]]:
    """Return the ranks of every group that Megatron has made for this rank, by kind."""
    groups = {
        "TP": parallel_state.get_tensor_model_parallel_group(),
        "CP": parallel_state.get_context_parallel_group(),
        "DP": parallel_state.get_data_parallel_group(),
        "PP": parallel_state.get_pipeline_model_parallel_group(),
        "DP·CP": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "ETP": parallel_state.get_expert_tensor_parallel_group(),
        "EP": parallel_state.get_expert_model_parallel_group(),
        "EDP": parallel_state.get_expert_data_parallel_group(),
        "ETP·EP": parallel_state.get_expert_tensor_and_model_parallel_group(),
    }
    ranks_of = torch.distributed.get_process_group_ranks
    return {kind: tuple(ranks_of(group)) for kind, group in groups.items()}


def planned_groups(folding: ParallelFolding) -> dict[str, tuple[int, ...]]:
    """Return what `nemo-upcycle groups` says of this rank's groups, by kind."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return {kind: found.of_rank(rank) for kind, found in rank_groups(folding, size).items()}


def forget_megatron() -> None:
    """Undo what Megatron keeps in the process: groups, microbatches, trained models."""
    parallel_state.destroy_model_parallel()
    for name, value in list(vars(parallel_state).items()):  # those that Megatron forgets to forget
        if isinstance(value, torch.distributed.ProcessGroup):
            setattr(parallel_state, name, None)
    num_microbatches_calculator.unset_num_microbatches_calculator()
    _free_models()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _free_models() -> None:
    """Free trained models, which hold process groups, each of them with threads that keep polling.

    DistributedDataParallel is kept by its hooks on its parameters' gradient accumulators, which
    Python cannot see: it is emptied. RotaryEmbedding is kept by the cache of its forward pass.
    """
    RotaryEmbedding.forward.cache_clear()
    # NeMo's is a class of its own.
    for each in gc.get_objects():
        if issubclass(type(each), DistributedDataParallel):
            vars(each).clear()
    del each
    gc.collect()

"""Faults for `nemo-upcycle check` to find: each breaks this rank's process, and can be undone."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from nemo_upcycle.check import mapping, models, process_groups, restart, saved, subject

Patch = tuple[Any, str, Callable[..., Any]]


def on_rank_1() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_rank() == 1


@torch.no_grad()
def swap_experts(chunks: models.Chunks) -> None:
    """Swap this rank's first two experts."""
    layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
    for layer in layers:
        first, second, *_ = layer.mlp.experts.local_experts
        for one, other in zip(first.parameters(), second.parameters(), strict=True):
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)


_OF_ONE_RANK: dict[int, tuple[float, float]] = {}


def one_rank_of_the_tiny_model(tiny: subject.Subject, rows: int) -> tuple[float, float]:
    """Return what `mapping.one_rank` does, computed once per process and number of rows."""
    if rows not in _OF_ONE_RANK:
        _OF_ONE_RANK[rows] = mapping.one_rank(tiny, rows)
    return _OF_ONE_RANK[rows]


def wrong_groups() -> Patch:
    """Megatron's expert-parallel groups are not those that were asked for."""
    make = parallel_state.initialize_model_parallel

    def of_other_sizes(**sizes: Any) -> None:
        sizes["expert_tensor_parallel_size"], sizes["expert_model_parallel_size"] = (
            sizes["expert_model_parallel_size"],
            sizes["expert_tensor_parallel_size"],
        )
        make(**sizes)

    return parallel_state, "initialize_model_parallel", of_other_sizes


def zero_expert() -> Patch:
    """The last rank's first expert is lost."""
    fill = mapping.fill_all

    @torch.no_grad()
    def without_one(chunks: models.Chunks, *args: Any) -> None:
        fill(chunks, *args)
        if on_rank_1():
            for parameter in chunks[0].decoder.layers[0].mlp.experts.local_experts[0].parameters():
                parameter.zero_()

    return mapping, "fill_all", without_one


def experts_in_another_order() -> Patch:
    """Experts are filled in another order on a rank of several."""
    fill = mapping.fill_all

    def in_another_order(chunks: models.Chunks, *args: Any) -> None:
        fill(chunks, *args)
        if on_rank_1():
            swap_experts(chunks)

    return mapping, "fill_all", in_another_order


def experts_trained_in_another_order() -> Patch:
    """The step sends tokens to other experts than the router means."""
    wrap = mapping.trainer

    def swapped(chunks: models.Chunks, *args: Any, **kwargs: Any) -> Any:
        if on_rank_1():
            swap_experts(chunks)
        return wrap(chunks, *args, **kwargs)

    return mapping, "trainer", swapped


def doubled_gradient() -> Patch:
    """Gradients are reduced twice."""
    finalize = subject.finalize_model_grads

    def twice(models: Any, *args: Any, **kwargs: Any) -> None:
        finalize(models, *args, **kwargs)
        for model in models:
            for parameter in model.parameters():
                parameter.main_grad.mul_(torch.distributed.get_world_size())

    return subject, "finalize_model_grads", twice


def lost_while_loading() -> Patch:
    """A parameter is not loaded."""
    load = saved.load_weights

    @torch.no_grad()
    def without_one(chunks: models.Chunks, state: Any) -> None:
        load(chunks, state)
        if on_rank_1():
            next(chunks[0].parameters()).add_(1.0)

    return saved, "load_weights", without_one


def optimizer_not_loaded() -> Patch:
    """A resumed training begins with a new optimizer."""
    wrap = restart.trainer

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        models, optimizer = wrap(*args, **kwargs)
        optimizer.load_state_dict = lambda state: None
        return models, optimizer

    return restart, "trainer", forgetful


def killed_in_this_process() -> Patch:
    """No fault: a training that ends leaves the checkpoint that a killed training leaves."""

    def ended(subject: Any, folding: Any, directory: Path, port: int) -> int:
        with process_groups.job():
            restart.train(subject, folding, directory / "killed")
        return -signal.SIGKILL

    return restart, "_run", ended


def never_killed() -> Patch:
    """The training that should be killed ends by itself."""

    def ended(subject: Any, folding: Any, directory: Path, port: int) -> int:
        restart._log(directory).write_text("ended")
        return 0

    return restart, "_run", ended


def error_on_one_rank() -> Patch:
    """A rank cannot build its model."""
    build = mapping.build

    def failing(chosen: Any, folding: Any) -> Any:
        if on_rank_1() and folding.expert_model_parallel_size == 1:
            raise ValueError("no such layer")
        return build(chosen, folding)

    return mapping, "build", failing


def groups_not_as_planned() -> Patch:
    """The plan of groups is wrong."""
    planned = process_groups.planned_groups

    def others(folding: Any) -> dict[str, tuple[int, ...]]:
        return planned(folding) | {"DP": (1, 0)}

    return mapping, "planned_groups", others

"""Every rank hears of an error on any rank, and notices a rank that is gone."""

import os
import signal
import time
from typing import Any

import pytest

from nemo_upcycle.engine.ranks import Ranks
from nemo_upcycle.errors import UpcyclingError
from tests.distributed.nursery import Nursery
from tests.thorough import thorough

LOST = {
    "killed": signal.SIGKILL,  # the others see the connection end
    "stopped": signal.SIGSTOP,  # they see nothing
}
PATIENCE_S = {"killed": 600.0, "stopped": 8.0}
"""How long the others wait: to the end only for a rank that is stopped."""


def exchange(
    values: list[Any], sleep_s: float = 0.0, lose: int | None = None, how: str = "killed"
) -> Any:
    """Gather the ranks' values, rank by rank later, and lose one before it comes."""
    import torch

    torch.distributed.init_process_group("gloo")
    ranks = Ranks(timeout_s=PATIENCE_S[how])
    time.sleep(ranks.rank * sleep_s)
    torch.distributed.barrier()  # all have left `Ranks`
    if ranks.rank == lose:
        os.kill(os.getpid(), LOST[how])
    value = values[ranks.rank]
    try:
        if isinstance(value, Exception):
            ranks.raise_on_all(value)
        return ranks.gather(value)
    except UpcyclingError as error:
        return str(error)


def share_errors(errors: list[str | None]) -> str:
    import torch

    torch.distributed.init_process_group("gloo")
    ranks = Ranks(timeout_s=PATIENCE_S["killed"])
    text = errors[ranks.rank]
    try:
        ranks.raise_on_all(UpcyclingError(text) if text else None)
    except UpcyclingError as error:
        return str(error)
    return "no error"


def test_one_process_is_all_ranks() -> None:
    ranks = Ranks()
    assert ranks.gather("me") == ["me"]
    ranks.raise_on_all(None)
    with pytest.raises(UpcyclingError, match="this"):
        ranks.raise_on_all(ValueError("this"))


def test_values_come_in_rank_order_however_late(nursery: Nursery) -> None:
    run = nursery.start(exchange, 3, values=["a", "b", "c"], sleep_s=0.5)
    assert run.wait() == [0, 0, 0]
    assert [run.result(rank) for rank in range(3)] == [["a", "b", "c"]] * 3


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        ([None, None, None], "no error"),
        (["x", "x", "x"], "x"),
        ([None, "x", None], "rank 1: x"),
        (["x", "y", "x"], "rank 0,2: x; rank 1: y"),
    ],
)
def test_an_error_is_raised_on_all(
    nursery: Nursery, errors: list[str | None], message: str
) -> None:
    run = nursery.start(share_errors, 3, errors=errors)
    run.wait()
    assert [run.result(rank) for rank in range(3)] == [message] * 3


@pytest.mark.parametrize("how", LOST)
@pytest.mark.parametrize("lose", [0, thorough(2)])
def test_a_lost_rank_is_an_error_on_the_others(nursery: Nursery, lose: int, how: str) -> None:
    others = [rank for rank in range(3) if rank != lose]
    run = nursery.start(exchange, 3, values=["a", "b", "c"], lose=lose, how=how)
    assert run.wait(*others) == [0, 0]
    for rank in others:
        who = (
            f"rank {lose}" if rank == 0 else "another rank (rank 0 says which, unless it is rank 0)"
        )
        assert f"Rank {rank} got no answer from {who}, which has ended" in run.result(rank)


def test_of_two_ranks_the_other_is_named(nursery: Nursery) -> None:
    run = nursery.start(exchange, 2, values=["a", "b"], lose=0)
    assert run.wait(1) == [0]
    assert run.result(1).startswith("Rank 1 got no answer from rank 0, which has ended")


def test_a_lost_rank_does_not_hide_an_error(nursery: Nursery) -> None:
    error = UpcyclingError("the disk is gone")
    run = nursery.start(exchange, 2, values=[error, None], lose=1)
    assert run.wait(0) == [0]
    assert run.result(0).startswith("the disk is gone (Rank 0 got no answer from rank 1")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UpcyclingError("no weights"), "no weights"),
        (KeyError("num_layers"), "KeyError: 'num_layers'"),
        (AssertionError(), "AssertionError: "),
    ],
    ids=["ours", "another", "without a word"],
)
def test_what_is_not_ours_says_what_it_is(error: Exception, said: str) -> None:
    with pytest.raises(UpcyclingError) as raised:
        Ranks().raise_on_all(error)
    assert str(raised.value) == said
    assert raised.value.__cause__ is error

"""A run that a scheduler stops saves first, and goes on when it is started again."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.nemo.auto_resume import saved_step
from tests.distributed.nursery import Nursery
from tests.distributed.pool import RankPool, nemo_recipe
from tests.thorough import thorough
from tests.workspace import make_workspace

STEPS = 4
TOLD_AT = 2


@nemo_recipe
def train(
    directory: Path,
    told: int | None,
    number: int = signal.SIGTERM,
    times: int = 1,
    ep: int = 2,
) -> tuple[Any, list[int]]:
    """Train; a signal reaches one rank after some steps. Return the exit code and the steps made.

    More than one signal come as a user presses a key again.
    """
    import fiddle
    import lightning.pytorch as pl
    from nemo.lightning import io
    from nemo_upcycle_recipes import llama_tiny

    class Tell(pl.Callback, io.IOMixin):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            self.steps.append(trainer.global_step + 1)
            if trainer.global_step + 1 == TOLD_AT and int(os.environ["RANK"]) == told:
                for _ in range(times):
                    os.kill(os.getpid(), number)
                    time.sleep(1.1 * (times - 1))

    recipe = llama_tiny.upcycled_recipe(
        dir=str(directory), name="stopped", max_steps=STEPS, expert_model_parallel_size=ep
    )
    recipe.trainer.limit_val_batches = 0
    run = fiddle.build(recipe)
    tell = Tell()
    run.keywords["trainer"].callbacks.append(tell)
    numbers = signal.SIGTERM, signal.SIGHUP, signal.SIGINT
    before = [signal.getsignal(each) for each in numbers]
    code = None
    try:
        run()
    except SystemExit as stopped:
        code = stopped.code
    assert before == [signal.getsignal(each) for each in numbers]
    return code, tell.steps


@pytest.mark.parametrize(
    ("number", "told", "code"),
    [
        pytest.param(signal.SIGTERM, 0, 143, marks=pytest.mark.slow),
        (signal.SIGTERM, 1, 143),
        thorough((signal.SIGHUP, 1, 143)),
        (signal.SIGINT, 0, 130),
    ],
    ids=["SIGTERM on rank 0", "SIGTERM on rank 1", "SIGHUP", "Ctrl-C"],
)
def test_a_signal_saves_and_the_same_command_goes_on(
    ranks: RankPool, tmp_path: Path, number: int, told: int, code: int
) -> None:
    make_workspace(tmp_path)
    options: dict[str, Any] = {"directory": tmp_path}
    assert ranks.run(train, 2, told=told, number=number, **options) == [(code, [1, 2])] * 2
    (saved,) = (tmp_path / "stopped" / "checkpoints").glob("*-last")
    assert saved_step(saved / "weights") == TOLD_AT
    assert ranks.run(train, 2, told=None, **options) == [(None, [3, 4])] * 2


def test_a_second_interrupt_ends_at_once(nursery: Nursery, tmp_path: Path) -> None:
    make_workspace(tmp_path)
    run = nursery.start(train, 1, directory=tmp_path, told=0, number=signal.SIGINT, times=2, ep=1)
    assert run.wait() == [130], run.said(0)[-3000:]
    assert "[preemption] Ctrl-C: saving at the end of this step" in run.said(0)
    assert "[preemption] Ctrl-C again: ended at once" in run.said(0)
    assert not list((tmp_path / "stopped" / "checkpoints").glob("*"))


@nemo_recipe
def interrupt_upcycling(directory: Path) -> Any:
    """Ctrl-C reaches rank 0 as it upcycles, and nothing else happens to the others."""
    import fiddle
    from nemo_upcycle_recipes import llama_tiny

    from nemo_upcycle.engine import upcycling

    recipe = llama_tiny.upcycled_recipe(dir=str(directory), name="early", max_steps=STEPS)
    fill = upcycling.fill

    def interrupted(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return fill(*arguments, **options)

    upcycling.fill = interrupted
    fiddle.build(recipe)()


def test_an_interrupt_before_training_is_one_line(nursery: Nursery, tmp_path: Path) -> None:
    make_workspace(tmp_path)
    run = nursery.start(interrupt_upcycling, 1, directory=tmp_path)
    assert run.wait() == [130], run.said(0)[-3000:]
    said = run.said(0)
    assert "[preemption] Ctrl-C before the first step: there is nothing to save" in said
    assert "Traceback" not in said
    assert not list((tmp_path / "early").glob("checkpoints/*"))

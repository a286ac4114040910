"""A run that a scheduler stops saves first, and goes on when it is started again."""

from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.training.auto_resume import saved_step
from tests.distributed.pool import RankPool, nemo_recipe
from tests.workspace import make_workspace

STEPS = 4
TOLD_AT = 2


@nemo_recipe
def train(directory: Path, told: int | None) -> tuple[int | None, list[int]]:
    """Train; SIGTERM reaches one rank after some steps. Return the exit code and the steps made."""
    import os
    import signal

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
                os.kill(os.getpid(), signal.SIGTERM)

    recipe = llama_tiny.upcycled_recipe(
        dir=str(directory), name="stopped", max_steps=STEPS, expert_model_parallel_size=2
    )
    recipe.trainer.limit_val_batches = 0
    run = fiddle.build(recipe)
    tell = Tell()
    run.keywords["trainer"].callbacks.append(tell)
    before = signal.getsignal(signal.SIGTERM)
    code = None
    try:
        run()
    except SystemExit as stopped:
        code = stopped.code
    assert signal.getsignal(signal.SIGTERM) is before
    return code, tell.steps


@pytest.mark.parametrize("told", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_sigterm_saves_and_the_same_command_goes_on(
    ranks: RankPool, tmp_path: Path, told: int
) -> None:
    make_workspace(tmp_path)
    options: dict[str, Any] = {"directory": tmp_path}
    assert ranks.run(train, 2, told=told, **options) == [(143, [1, 2])] * 2
    (saved,) = (tmp_path / "stopped" / "checkpoints").glob("*-last")
    assert saved_step(saved / "weights") == TOLD_AT
    assert ranks.run(train, 2, told=None, **options) == [(None, [3, 4])] * 2

"""Runs of the tiny recipe that are started, stopped and started again."""

from pathlib import Path
from typing import Any

from tests.distributed.nursery import Nursery
from tests.distributed.training import EP2, train

STEPS, STOPPED = 4, 2
OVERRIDES = {
    "trainer.limit_val_batches": 0,
    "data.global_batch_size": 8,
    "data.micro_batch_size": 2,
}


class Runs:
    """Runs of the tiny recipe on 2 ranks, and what they can be resumed as."""

    def __init__(self, nursery: Nursery, workspace: Path) -> None:
        self.nursery, self.workspace = nursery, workspace

    def start(
        self,
        directory: Path,
        world_size: int = 2,
        options: dict[str, Any] | None = None,
        overrides: dict[str, Any] | None = None,
        accident: tuple[str, dict[str, Any]] | None = None,
        factory: str = "upcycled_recipe",
    ) -> tuple[list[Any], str]:
        """Start `directory/run`; return each rank's losses or error, and what rank 0 said."""
        for part in ("data", "tokenizer", "dense_hf"):
            if not (directory / part).exists():
                (directory / part).symlink_to(self.workspace / part)
        run = self.nursery.start(
            train,
            world_size,
            directory=directory,
            options={"name": "run", "max_steps": STEPS, **(EP2 if options is None else options)},
            overrides=OVERRIDES | (overrides or {}),
            accident=accident,
            factory=factory,
        )
        assert run.wait() == [0] * world_size, run.said(0)[-3000:]
        results = [run.result(rank) for rank in range(world_size)]
        return [r if isinstance(r, str) else r[0] for r in results], run.said(0)

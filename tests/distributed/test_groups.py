"""The process groups that Megatron builds are those that the folding says."""

from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.check.process_groups import groups_of_rank
from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.plans.groups import KINDS, rank_groups
from tests.distributed.foldings import FOLDINGS
from tests.distributed.pool import RankPool, destroy_groups, nemo_recipe
from tests.thorough import thorough
from tests.workspace import make_workspace

PAPERS_SHAPE = ParallelFolding.of(tp=2, pp=2, vpp=2, ep=2, etp=1)


def groups_of(foldings: list[ParallelFolding]) -> list[dict[str, tuple[int, ...]]]:
    """Build the groups of mappings, one after another."""
    from megatron.core import parallel_state

    found = []
    for folding in foldings:
        parallel_state.initialize_model_parallel(**folding.parallel_sizes)
        found.append(groups_of_rank())
        parallel_state.destroy_model_parallel()
        destroy_groups()
    return found


def check(folding: ParallelFolding, by_rank: list[dict[str, tuple[int, ...]]]) -> None:
    said = rank_groups(folding, len(by_rank))
    for rank, found in enumerate(by_rank):
        assert found.keys() == KINDS.keys()
        assert found == {kind: groups.of_rank(rank) for kind, groups in said.items()}, rank


@pytest.mark.parametrize("world_size", [2, thorough(4)])
def test_groups_of_every_mapping(ranks: RankPool, world_size: int) -> None:
    foldings = [each.folding for each in FOLDINGS.values() if each.world_size == world_size]
    results = ranks.run(groups_of, world_size, foldings=foldings)
    assert len(foldings) > 10
    for number, folding in enumerate(foldings):
        check(folding, [found[number] for found in results])


@nemo_recipe
def groups_of_recipe(directory: Path, folding: ParallelFolding) -> Any:
    """Train a step of the tiny recipe; return the groups that it trained with."""
    import fiddle
    import lightning.pytorch as pl
    from nemo.lightning import io
    from nemo_upcycle_recipes import llama_tiny

    class Look(pl.Callback, io.IOMixin):
        def on_train_batch_end(self, *_: Any) -> None:
            self.found = groups_of_rank()

    recipe = llama_tiny.upcycled_recipe(
        dir=str(directory), name="groups", max_steps=1, **vars(folding)
    )
    recipe.log.ckpt = None
    recipe.trainer.limit_val_batches = 0
    run = fiddle.build(recipe)
    look = Look()
    run.keywords["trainer"].callbacks.append(look)
    run()
    return look.found


def test_groups_of_the_tiny_recipe_in_the_papers_shape(ranks: RankPool, tmp_path: Path) -> None:
    make_workspace(tmp_path)
    ranks.stop()  # see `new_ranks`: the tests above give these a past
    check(PAPERS_SHAPE, ranks.run(groups_of_recipe, 4, directory=tmp_path, folding=PAPERS_SHAPE))

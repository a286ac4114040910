"""The ranks of the tests forget what a test has made: process groups above all.

A process group has three threads that keep polling. Threads of a kept group slow down all tests
that come after.
"""

from pathlib import Path

import pytest

from tests.distributed import scenarios
from tests.distributed.foldings import FOLDINGS
from tests.distributed.grid import IDS, Grid
from tests.distributed.pool import RankPool
from tests.distributed.training import train
from tests.workspace import make_workspace


def threads() -> int:
    """Return how many threads this rank has, those of process groups and some that stay."""
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.thorough
def test_mappings_leave_no_process_groups(ranks: RankPool, grid: Grid) -> None:
    on_two = [mapping for mapping in FOLDINGS.values() if mapping.world_size == 2]
    counts = []
    for mapping in on_two[:10]:
        grid.call(scenarios.upcycled_step, mapping, ids=IDS)
        counts.append(max(ranks.run(threads, 2)))
    assert max(counts) <= counts[0] + 3, counts  # one group's; a mapping has more than ten groups


@pytest.mark.thorough
def test_trainings_leave_no_process_groups(ranks: RankPool, tmp_path: Path) -> None:
    workspace, counts = make_workspace(tmp_path), []
    for number in range(2):
        options = {"name": str(number), "max_steps": 1, "expert_model_parallel_size": 2}
        ranks.run(train, 2, directory=workspace, options=options, overrides={"log.ckpt": None})
        counts.append(ranks.run(threads, 2)[0])
    assert counts[1] <= counts[0] + 10, counts  # a training's groups have more than 50

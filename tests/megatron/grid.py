"""Runs each mapping of `tests/distributed/foldings.py` once, for all tests that look at it."""

from functools import cached_property
from pathlib import Path

import torch

from tests.distributed.foldings import DENSE, FOLDINGS, ONE_RANK
from tests.distributed.pool import RankPool
from tests.distributed.whole import assemble
from tests.megatron import scenarios
from tests.tiny import tokens, write_llama

IDS = tokens(rows=4, length=33)
"""A global batch, and the last labels: 32 inputs divide into 2·CP chunks, these over TP."""

WAYS = (
    "noise",
    "drop(ratio=0.3)",
    "random",
    "hybrid(copy, drop, noise(std=0.5), random)",
    "branches",
    "read once",
    "copy",
)


def ways(dense: Path, branch: Path) -> dict[str, scenarios.Way]:
    """Return all ways to upcycle; what follows in a test is done with the last."""
    return {
        **{name: scenarios.Way(str(dense), name) for name in WAYS[:4]},
        "branches": scenarios.Way(f"{dense},{branch}"),
        "read once": scenarios.Way(str(dense), read_once=True),
        "copy": scenarios.Way(str(dense)),
    }


class Shown:
    """What the ranks of one mapping showed, put together."""

    def __init__(self, ranks: list[scenarios.Evidence]) -> None:
        self.weights = {
            way: assemble(shard for rank in ranks for shard in rank.weights[way])
            for way in ranks[0].weights
        }
        self.logits = [rank.logits for rank in ranks if rank.logits is not None]
        self.gradients = assemble(shard for rank in ranks for shard in rank.gradients)
        self.clip_norms = [rank.grad_norm for rank in ranks]
        self.losses = [rank.loss for rank in ranks]

    @cached_property
    def grad_norm(self) -> float:
        """The gradient's norm, each element of each parameter counted once."""
        squares = [grad.double().square().sum() for grad in self.gradients.parameters.values()]
        return float(torch.stack(squares).sum()) ** 0.5


class Grid:
    """The mappings, each run at the first call that asks for it."""

    def __init__(self, ranks: RankPool, directory: Path) -> None:
        self._ranks = ranks
        self._directory = directory
        self._shown: dict[str, Shown] = {}

    def dense(self, name: str, seed: int = 0) -> Path:
        """Return the directory of a dense model of `DENSE`, or of another one like it."""
        directory = self._directory / str(seed) / name
        if not directory.exists():
            write_llama(directory, seed=seed, **DENSE[name])
        return directory

    def run(self, name: str) -> Shown:
        """Return what a mapping showed."""
        if name not in self._shown:
            mapping = (FOLDINGS | ONE_RANK)[name]
            dense, branch = self.dense(mapping.dense), self.dense(mapping.dense, seed=1)
            self._shown[name] = Shown(
                self._ranks.run(
                    scenarios.prove,
                    mapping.world_size,
                    dense=dense,
                    folding=mapping.folding,
                    ways=ways(dense, branch),
                    ids=IDS,
                )
            )
        return self._shown[name]

    def one_rank(self, name: str) -> Shown:
        """Return what one rank showed of the same dense model."""
        return self.run(f"1 rank, {FOLDINGS[name].dense}")

"""Runs each mapping of `foldings.py` once, for all tests that look at it."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_upcycle.config import UpcyclingConfig
from tests.calibrations import write_statistics
from tests.distributed import scenarios
from tests.distributed.foldings import DENSE, FOLDINGS, ONE_RANK, Spread, spread
from tests.distributed.megatron_dense import save_dense
from tests.distributed.pool import RankPool
from tests.distributed.whole import assemble
from tests.tiny import tokens, write_llama

IDS = tokens(rows=4, length=33)
"""A global batch, and the last labels: 32 inputs divide into 2·CP chunks, these over TP."""


INITIALIZERS = (
    "noise",
    "drop(ratio=0.3)",
    "random",
    "hybrid(copy, drop, noise(std=0.5), random)",
)
OF_STATISTICS = {
    **dict.fromkeys(("centroids", "prompts", "ridge"), "router_initializer"),
    **dict.fromkeys(("activation_sorted", "partial", "cluster_svd"), "initializer"),
}
"""Initializers with a file of statistics, and the option that takes them."""

WAYS = (
    *INITIALIZERS,
    *OF_STATISTICS,
    "branches",
    "branches, dropped",
    "read once",
    "megatron",
    "huggingface",
)


class Shown:
    """What the ranks of one mapping showed, put together.

    Attributes:
        weights: After upcycling, by way of upcycling.
        logits: Of the last stage's ranks.
        loss: Of the first step.
        gradients: Of the first step.
        clip_norms: Their norm as each rank's optimizer counts it.
    """

    def __init__(self, ranks: list[scenarios.Evidence]) -> None:
        self.weights = {
            way: assemble(shard for rank in ranks for shard in rank.weights[way])
            for way in ranks[0].weights
        }
        self.logits = [rank.logits for rank in ranks if rank.logits is not None]
        loss_sum, count = sum(rank.loss for rank in ranks)
        self.loss = float(loss_sum / count)
        self.gradients = assemble(shard for rank in ranks for shard in rank.gradients)
        self.clip_norms = [rank.grad_norm for rank in ranks]

    @cached_property
    def grad_norm(self) -> float:
        """The gradient's norm, each element of each parameter counted once."""
        squares = [grad.double().square().sum() for grad in self.gradients.parameters.values()]
        return float(sum(squares)) ** 0.5


class Grid:
    """The mappings, each run at the first call that asks for it."""

    def __init__(self, ranks: RankPool, directory: Path) -> None:
        self._ranks = ranks
        self._directory = directory
        self._dense: dict[str, Path] = {}
        self._megatron: dict[str, Path] = {}
        self._shown: dict[str, Shown] = {}

    def dense(self, name: str) -> Path:
        """Return the directory of a dense model of `DENSE`."""
        if name not in self._dense:
            self._dense[name] = write_llama(self._directory / name, **DENSE[name])
        return self._dense[name]

    def branch(self, name: str) -> Path:
        """Return another dense model of the same architecture."""
        directory = self._directory / "branch" / name
        if not directory.exists():
            write_llama(directory, seed=1, **DENSE[name])
        return directory

    def megatron(self, name: str) -> Path:
        """Return the same dense model as Megatron's ranks save it, on TP2 and PP2."""
        if name not in self._megatron:
            self._megatron[name] = self._directory / "megatron" / name
            self._ranks.run(
                save_dense,
                4,
                dense=self.dense(name),
                folding=spread(4, tp=2, pp=2).folding,
                directory=self._megatron[name],
            )
        return self._megatron[name]

    def statistics(self, name: str) -> Path:
        """Return a file of statistics that fits a dense model of `DENSE`."""
        file = self._directory / "statistics" / name
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            write_statistics(file, self.dense(name))
        return file

    def saved(self, name: str) -> Path:
        """Return the directory of the checkpoint that a mapping saves."""
        return self._directory / "saved" / name

    def run(self, name: str) -> Shown:
        """Return what a mapping showed."""
        if name not in self._shown:
            mapping = (FOLDINGS | ONE_RANK)[name]
            self._shown[name] = Shown(
                self.call(
                    scenarios.prove,
                    mapping,
                    ways=self._ways(mapping.dense),
                    ids=IDS,
                    save_to=self.saved(name),
                )
            )
        return self._shown[name]

    def _ways(self, name: str) -> dict[str, scenarios.Way]:
        dense, megatron = str(self.dense(name)), str(self.megatron(name))
        ways = {
            initializer: scenarios.Way(dense, upcycling={"initializer": initializer})
            for initializer in INITIALIZERS
        }
        ways |= {
            initializer: scenarios.Way(
                dense, upcycling={option: f"{initializer}(stats={str(self.statistics(name))!r})"}
            )
            for initializer, option in OF_STATISTICS.items()
        }
        return ways | {
            "branches": scenarios.Way(f"{dense},{self.branch(name)}"),
            "branches, dropped": scenarios.Way(
                f"{dense},{self.branch(name)}", upcycling={"initializer": "drop"}
            ),
            "read once": scenarios.Way(dense, read_once=True),
            "megatron": scenarios.Way(megatron),
            "huggingface": scenarios.Way(dense),
        }

    def one_rank(self, name: str) -> Shown:
        """Return what one rank showed of the same dense model."""
        return self.run(f"1 rank, {FOLDINGS[name].dense}")

    def call(self, scenario: Callable[..., Any], mapping: Spread, **kwargs: Any) -> list[Any]:
        """Call a scenario on the ranks of a mapping."""
        return self._ranks.run(
            scenario,
            mapping.world_size,
            dense=self.dense(mapping.dense),
            folding=mapping.folding,
            upcycling=UpcyclingConfig(),
            **kwargs,
        )

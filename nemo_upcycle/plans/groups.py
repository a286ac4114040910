"""Which ranks work together: Megatron's process groups of a folding, without Megatron.

Attention is distributed over TP×CP×DP×PP, experts over ETP×EP×EDP×PP; both have the same pipeline
stages. The ranks of a group differ only in the coordinates that the group is named after.

Source: MoE Parallel Folding, arXiv 2504.14960 §3.
"""

from collections import defaultdict
from dataclasses import dataclass

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.plans.layout import Coordinates, coordinates

ATTENTION = ("tp", "cp", "dp", "pp")
EXPERTS = ("etp", "ep", "edp", "pp")

KINDS: dict[str, tuple[str, ...]] = {
    "TP": ("tp",),
    "CP": ("cp",),
    "DP": ("dp",),
    "PP": ("pp",),
    "DP·CP": ("dp", "cp"),
    "ETP": ("etp",),
    "EP": ("ep",),
    "EDP": ("edp",),
    "ETP·EP": ("etp", "ep"),
}
"""Kinds of groups, with the coordinates in which the ranks of a group differ."""

PURPOSES = {
    "TP": "attention and dense layers: all-gather and reduce-scatter in every layer",
    "CP": "keys and values of the whole sequence",
    "DP": "other rows of the batch",
    "PP": "activations from stage to stage",
    "DP·CP": "gradients and the optimizer's shards of all but experts",
    "ETP": "activations between an expert's shards",
    "EP": "tokens to their experts: all-to-all in every MoE layer",
    "EDP": "gradients and the optimizer's shards of experts",
    "ETP·EP": "the ranks among which the dispatcher sends tokens",
}


@dataclass(frozen=True)
class Groups:
    """All groups of a kind.

    Attributes:
        kind: A key of `KINDS`.
        ranks: The groups, sorted by first rank; each in Megatron's order.
    """

    kind: str
    ranks: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Ranks in each group."""
        return len(self.ranks[0])

    def nodes(self, gpus_per_node: int) -> int:
        """Return how many nodes the widest group spans.

        Args:
            gpus_per_node: Ranks per node; a node has consecutive ranks.
        """
        return max(len({rank // gpus_per_node for rank in group}) for group in self.ranks)

    def of_rank(self, rank: int) -> tuple[int, ...]:
        """Return a rank's group."""
        return next(group for group in self.ranks if rank in group)


def rank_groups(folding: ParallelFolding, world_size: int) -> dict[str, Groups]:
    """Return all groups of a job, by kind.

    Args:
        folding: The parallel mapping.
        world_size: Ranks of the job.

    Raises:
        UpcyclingError: The mapping does not divide the world size.
    """
    places = [coordinates(folding, world_size, rank) for rank in range(world_size)]
    return {kind: _groups(kind, places) for kind in KINDS}


def _groups(kind: str, places: list[Coordinates]) -> Groups:
    varied = KINDS[kind]
    axes = ATTENTION if set(varied) <= set(ATTENTION) else EXPERTS
    fixed = [axis for axis in axes if axis not in varied]
    members: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank, place in enumerate(places):
        members[tuple(getattr(place, axis) for axis in fixed)].append(rank)
    return Groups(kind, tuple(tuple(ranks) for ranks in members.values()))

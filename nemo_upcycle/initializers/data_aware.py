"""Expert initializers that read statistics of the dense model over text."""

import numpy as np
import numpy.typing as npt

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.initializers.neurons import Neurons, Values
from nemo_upcycle.initializers.options import check_fraction
from nemo_upcycle.initializers.registry import Initializer, register
from nemo_upcycle.initializers.statistics import Statistics, Target

_TILE = 64
"""Neurons of a matrix product, whose last bits depend on its shape."""


@register("activation_sorted")
def activation_sorted(stats: str) -> Initializer:
    """Sort the layer's neurons by how often they are active, before they are cut into shards.

    Shard 0 gets the most active neurons. All shards of a copy together are the dense layer, in
    another order. Neurons that are equally often active are sorted by magnitude, then by number.

    Args:
        stats: File of statistics.

    Source: activation rates of CMoE, arXiv 2502.04416; the order alone, not its clustering.
    """
    return _ActivationSorted(Statistics.named("activation_sorted", stats))


class _ActivationSorted:
    def __init__(self, stats: Statistics) -> None:
        self.stats = stats

    def check(self, target: Target) -> None:
        self.stats.check(target)

    def __call__(self, neurons: Neurons) -> None:
        order = _most_active(self.stats, neurons)[neurons.ids.start : neurons.ids.stop]
        for part, values in neurons.values.items():
            values[:] = neurons.dense(part, order)


@register("partial")
def partial(stats: str, shared: float = 0.5) -> Initializer:
    """Keep the most active neurons of each expert, and redraw the others as `drop` does.

    `drop` redraws neurons at random; here all experts share the neurons that the text needs most.

    Args:
        stats: File of statistics.
        shared: Fraction of an expert's neurons that stays, rounded down.
    """
    check_fraction("partial", "shared", shared)
    return _Partial(Statistics.named("partial", stats), shared)


class _Partial:
    def __init__(self, stats: Statistics, shared: float) -> None:
        self.stats, self._shared = stats, shared

    def check(self, target: Target) -> None:
        self.stats.check(target)

    def __call__(self, neurons: Neurons) -> None:
        order = _most_active(self.stats, neurons)
        own = order[(order >= neurons.expert_ids.start) & (order < neurons.expert_ids.stop)]
        kept = own[: int(self._shared * len(own))]
        redrawn = ~np.isin(np.arange(neurons.ids.start, neurons.ids.stop), kept)
        for part, values in neurons.values.items():
            mean, std = neurons.statistics(part)
            values[redrawn] = mean + std * neurons.normal(part, redrawn)


def _most_active(stats: Statistics, neurons: Neurons) -> npt.NDArray[np.int64]:
    """Return the dense layer's neurons from the most to the least active, with ties by number.

    Of several dense checkpoints, the layer is that of the copy's checkpoint, over its own text.
    """
    branches = stats.manifest["branches"]
    where = f"sources.{neurons.copy % branches}." if branches > 1 else ""
    rate, magnitude = (
        stats.get(neurons.layer, f"{where}neurons.{name}") for name in ("rate", "magnitude")
    )
    return np.lexsort((-magnitude, -rate)).astype(np.int64)


@register("cluster_svd")
def cluster_svd(stats: str, rank: int | None = None) -> Initializer:
    """Fit gate and up of each copy to the inputs of a cluster, with a lower rank.

    Copy k's stacked gate and up are U·Uᵀ·W, where U are the first left singular vectors of W·Xᵀ,
    for the dense layer's W and the inputs X of cluster k. No matrix of that rank is closer to W for
    these inputs. Down stays. `centroids` sends a cluster's inputs to the cluster's copy.

    This is a reading of the paper's abstracts, "a data-aware truncated SVD of the dense weights
    within its cluster"; the paper's own formula was not at hand.

    Args:
        stats: File of statistics with as many clusters as copies of the layer, calibrated with
            --cluster-rank.
        rank: Number of singular vectors; None takes that of the statistics.

    Source: arXiv 2604.13508.
    """
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise UpcyclingError(f"cluster_svd: rank is {rank!r}; expected a whole number above 0.")
    return _ClusterSVD(Statistics.named("cluster_svd", stats), rank)


class _ClusterSVD:
    def __init__(self, stats: Statistics, rank: int | None) -> None:
        self.stats, self._rank = stats, rank

    def check(self, target: Target) -> None:
        self.stats.check(target)
        self.stats.check_clusters(target.upcycling.expansion_rate, "copy of the layer")
        most, rank = self.stats.manifest.get("cluster_rank", 0), self._rank or 1
        if rank > most:
            raise UpcyclingError(
                f"{self.stats.file} has weights of rank {most} per cluster; cluster_svd needs "
                f"{rank} or more. Calibrate with --cluster-rank."
            )

    def __call__(self, neurons: Neurons) -> None:
        basis = self.stats.get(neurons.layer, "clusters.basis")[neurons.copy]
        width = self.stats.manifest["ffn_hidden_size"]
        to_rank, from_rank = (each[: self._rank] for each in basis)
        for part, values in neurons.values.items():
            if part != "down":
                values[:] = _in_tiles(neurons, part, width, to_rank, from_rank)


def _in_tiles(
    neurons: Neurons, part: str, width: int, to_rank: Values, from_rank: Values
) -> Values:
    """Return the block of W·Aᵀ·B, computed in tiles that do not depend on the block."""
    import torch

    first, stop = neurons.ids.start // _TILE * _TILE, neurons.ids.stop
    down, up = torch.from_numpy(to_rank).T, torch.from_numpy(from_rank)
    tiles = []
    for start in range(first, stop, _TILE):
        ids = np.arange(start, min(start + _TILE, width))
        tiles.append(torch.from_numpy(neurons.dense(part, ids)) @ down @ up)
    return torch.cat(tiles).numpy()[neurons.ids.start - first : stop - first]

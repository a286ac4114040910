"""Spherical k-means on a sample of a layer's inputs, seeded and deterministic."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from nemo_upcycle.initializers.random import CLUSTERS, generator

ROUNDS = 100
"""Maximum number of rounds; k-means usually ends earlier, when no input changes its cluster."""

_SMALLEST = 1e-12
"""Smallest square of a singular value, relative to the largest, that is told from 0 in fp64."""

Values = npt.NDArray[np.float32]


def cluster(inputs: Values, count: int, seed: int, layer: int) -> tuple[Values, Values]:
    """Cluster inputs by direction.

    The first centroids are inputs, each drawn with a probability proportional to the distance from
    the centroids before (k-means++). A cluster that loses all inputs takes the input that is
    farthest from its centroid.

    Args:
        inputs: [inputs, hidden]
        count: Number of clusters, at most the number of inputs.
        seed: Seed of the first centroids.
        layer: The layer, from 0; every layer has draws of its own.

    Returns:
        Centroids of length 1, [clusters, hidden], and the share of the inputs in each cluster.

    Source: the clusters of arXiv 2604.13508; k-means++, Arthur and Vassilvitskii, SODA 2007.
    """
    units = torch.nn.functional.normalize(torch.from_numpy(inputs), dim=1)
    centroids = _first_centroids(units, count, generator(seed, CLUSTERS, layer, 0, 0))
    before = None
    for _ in range(ROUNDS):
        likeness, own = (units @ centroids.T).max(1)
        own = _without_empty(own, likeness, count)
        if before is not None and torch.equal(own, before):
            break
        before = own
        sums = torch.zeros(count, units.shape[1], dtype=torch.float64)
        sums.index_add_(0, own, units.double())
        centroids = torch.nn.functional.normalize(sums, dim=1).float()
    shares = torch.bincount(own, minlength=count).double() / len(units)
    return centroids.numpy(), shares.float().numpy()


def bases(
    samples: Values, centroids: Values, rank: int, gram: Callable[[int], torch.Tensor]
) -> Values:
    """Return, per cluster, the best weights of low rank for the cluster's inputs.

    For the inputs X of a cluster [inputs, hidden] and the stacked weights W of gate and up
    [neurons, hidden], let U be the first `rank` left singular vectors of W·Xᵀ. Then U·Uᵀ·W is the
    matrix of that rank with the smallest |(W - W')·Xᵀ|. It equals W·Aᵀ·B.

    Args:
        samples: [inputs, hidden]
        centroids: [clusters, hidden]
        rank: Number of singular vectors.
        gram: Called with a cluster: WᵀW of the cluster's weights, [hidden, hidden], fp64.

    Returns:
        A and B of each cluster, [clusters, 2, rank, hidden]; zeros where W·Xᵀ has a smaller rank.
    """
    inputs, width = torch.from_numpy(samples), samples.shape[1]
    units = torch.nn.functional.normalize(inputs, dim=1)
    own = (units @ torch.from_numpy(centroids).T).argmax(1)
    found = torch.zeros(len(centroids), 2, rank, width, dtype=torch.float64)
    for number in range(len(centroids)):
        # X = Q·R with orthonormal Q, so that W·Xᵀ and W·Rᵀ have the same left singular vectors.
        triangle = torch.linalg.qr(inputs[own == number].double(), mode="r").R
        to_weights = triangle @ gram(number)
        squares, vectors = torch.linalg.eigh(to_weights @ triangle.T)  # ascending
        squares, vectors = squares.flip(0)[:rank], vectors.flip(1)[:, :rank]
        is_there = squares > _SMALLEST * squares[0]
        scaled = vectors[:, is_there] / squares[is_there].sqrt()
        count = int(is_there.sum())
        found[number, 0, :count] = scaled.T @ triangle
        found[number, 1, :count] = scaled.T @ to_weights
    return found.float().numpy()


def _first_centroids(units: torch.Tensor, count: int, random: np.random.Generator) -> torch.Tensor:
    chosen = [int(random.integers(len(units)))]
    distance = torch.full((len(units),), torch.inf, dtype=torch.float64)
    for _ in range(count - 1):
        to_last = (1 - units @ units[chosen[-1]]).clamp(min=0).double()
        distance = torch.minimum(distance, to_last)
        steps = distance.cumsum(0).numpy()
        chosen.append(int(np.searchsorted(steps, random.random() * steps[-1], side="right")))
        chosen[-1] = min(chosen[-1], len(units) - 1)
    return units[chosen]


def _without_empty(own: torch.Tensor, likeness: torch.Tensor, count: int) -> torch.Tensor:
    """Return the clusters of the inputs, where every cluster has an input."""
    sizes = torch.bincount(own, minlength=count)
    for empty in (sizes == 0).nonzero().flatten().tolist():
        farthest = torch.where(sizes[own] > 1, likeness, torch.inf).argmin()
        sizes[own[farthest]] -= 1
        own[farthest], sizes[empty], likeness[farthest] = empty, 1, 1.0
    return own

"""Statistics of a layer from what its lanes have summed."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from nemo_upcycle.calibration.clusters import Values, bases, cluster
from nemo_upcycle.calibration.lanes import Lane, Work
from nemo_upcycle.calibration.layer import DenseLayer
from nemo_upcycle.calibration.sums import Arrays, Totals
from nemo_upcycle.calibration.text import Prompts, Source
from nemo_upcycle.checkpoint.branches import open_branches
from nemo_upcycle.initializers.one_thread import one_thread


def reduce(
    work: Work,
    sources: Sequence[Source],
    prompts: Sequence[Prompts],
    lanes: Sequence[Lane],
    layer: int,
    clusters: int,
    cluster_rank: int,
    seed: int,
) -> Arrays:
    """Add the lanes' sums in order, and cluster the sampled inputs.

    Args:
        work: Has the lanes' files.
        sources: The text.
        prompts: The prompts of each expert.
        lanes: All lanes, complete for the layer.
        layer: The layer, from 0.
        clusters: Number of clusters.
        cluster_rank: Rank of the clusters' weights; 0 for none.
        seed: Seed of the clusters.

    Returns:
        The layer's statistics, by name.
    """
    arrays: Arrays = {}
    samples: list[Values] = []

    def of_source(number: int) -> Iterator[Arrays]:
        for lane in lanes:
            if lane.source == number:
                found = work.arrays(layer, lane)
                samples.append(found["sample"])
                yield found

    totals = []
    for number, source in enumerate(sources):
        totals.append(Totals.of(source.tokens, of_source(number)))
        if len(sources) > 1:
            means = totals[-1].means()
            means.pop("input.second_moment", None)
            arrays |= {f"sources.{number}.{name}": values for name, values in means.items()}
    tokens = sum(source.tokens for source in sources)
    arrays |= Totals.of(tokens, (each.sums for each in totals)).means()
    sample = np.concatenate(samples)
    with one_thread():
        centroids, shares = cluster(sample, clusters, seed, layer)
        arrays |= {"clusters.centroids": centroids, "clusters.share": shares}
        if cluster_rank:
            arrays["clusters.basis"] = bases(sample, centroids, cluster_rank, _grams(work, layer))
    of_prompts = [work.arrays(layer, lane)["means"] for lane in lanes if lane.source is None]
    return arrays | _of_prompts(prompts, of_prompts)


def _grams(work: Work, layer: int) -> Callable[[int], torch.Tensor]:
    """Return what gives WᵀW of the dense layer that a cluster's expert is made of."""
    with open_branches(work.dense) as checkpoint:
        count = len(checkpoint.branches)
        cpu = torch.device("cpu")
        grams = [DenseLayer(checkpoint, layer, branch, cpu).gram() for branch in range(count)]
    return lambda cluster: grams[cluster % count]


def _of_prompts(prompts: Sequence[Prompts], means: Sequence[Values]) -> Arrays:
    """Return the mean input of each expert's positive and negative prompts, a prompt counting once.

    Args:
        prompts: The prompts of each expert.
        means: The mean inputs of each expert's prompts, the positive ones first.
    """
    if not prompts:
        return {}
    none = np.zeros((1, means[0].shape[1]), np.float32)
    counts = [len(each.positive) for each in prompts]
    positive = [own[:count].mean(0) for own, count in zip(means, counts, strict=True)]
    negative = [
        (own[count:] if len(own) > count else none).mean(0)
        for own, count in zip(means, counts, strict=True)
    ]
    return {"prompts.positive": np.stack(positive), "prompts.negative": np.stack(negative)}

"""Router initializers: functions that return the rows of a layer's router.

Megatron's router has no bias. What a paper does with a bias, such as a threshold per expert, cannot
be expressed; each initializer says what is left out.
"""

import numpy as np

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.initializers.one_thread import one_thread
from nemo_upcycle.initializers.options import check_positive
from nemo_upcycle.initializers.registry import RouterInitializer, register_router
from nemo_upcycle.initializers.rows import RouterRows, Values
from nemo_upcycle.initializers.statistics import Statistics, Target

_APART = 0.01
"""What of a random row tells the rows of a source apart."""


@register_router("random")
def random() -> RouterInitializer:
    """Draw an independent row per expert (arXiv 2412.09952 §3)."""
    return _random


@register_router("virtual_groups")
def virtual_groups() -> RouterInitializer:
    """Draw a row per copy of the layer; equals `random` for granularity 1 (arXiv 2410.07524 §3)."""
    return _random


def _random(rows: RouterRows) -> Values:
    return rows.normal() * rows.std


@register_router("centroids")
def centroids(stats: str, scale: float | None = None, center: bool = True) -> RouterInitializer:
    """Take the centroids of the clusters of the layer's inputs.

    The centroids have length 1, so that the largest logit is that of the nearest centroid by angle.

    Args:
        stats: File of statistics with as many clusters as copies of the layer.
        scale: Root mean square of the rows' lengths. None takes the length of random rows,
            √hidden · router_init_std. The paper's rows have length 1, with center=False.
        center: Subtract the mean of the centroids. Inputs have a large common part, which adds the
            same to all logits. Without that part, rows of the same length tell inputs apart better.

    Source: arXiv 2604.13508.
    """
    return _Centroids(Statistics.named("centroids", stats), _checked("centroids", scale), center)


class _Centroids:
    def __init__(self, stats: Statistics, scale: float | None, center: bool) -> None:
        self.stats, self._scale, self._center = stats, scale, center

    def check(self, target: Target) -> None:
        self.stats.check(target)
        self.stats.check_clusters(target.upcycling.router_rows, "row of the router")

    def __call__(self, rows: RouterRows) -> Values:
        found = self.stats.get(rows.layer, "clusters.centroids").astype(np.float64)
        if self._center:
            found = found - found.mean(0)
        size = np.sqrt(np.square(found).sum(1).mean())
        return found * (_norm(rows, self._scale) / size if size > 0 else 0)


@register_router("prompts")
def prompts(stats: str, scale: float | None = None) -> RouterInitializer:
    """Point each row at the inputs of an expert's prompts, and away from its negative prompts.

    A row is the mean input over positive prompts less that over negative prompts. Every prompt
    counts once, whatever its length. mergekit takes the inputs of whole layers; here they are those
    of the feed-forward layer, which the router sees.

    Args:
        stats: File of statistics, calibrated with --prompts: a line per copy of the layer.
        scale: Length of the rows; None takes that of random rows. mergekit's is 1.

    Source: mergekit-moe, gate_mode `hidden`.
    """
    return _Prompts(Statistics.named("prompts", stats), _checked("prompts", scale))


class _Prompts:
    def __init__(self, stats: Statistics, scale: float | None) -> None:
        self.stats, self._scale = stats, scale

    def check(self, target: Target) -> None:
        self.stats.check(target)
        found, expected = len(self.stats.manifest["prompts"]), target.upcycling.router_rows
        if found != expected:
            raise UpcyclingError(
                f"{self.stats.file} has the prompts of {found} experts; expected {expected}, one "
                f"per row of the router. Calibrate with --prompts FILE, a file of {expected} lines."
            )
        if len(set(self.stats.manifest["prompts"])) < found:
            raise UpcyclingError(
                f"Two experts have the same prompts in {self.stats.file}: the router could not "
                "tell them apart. Give each expert prompts of its own."
            )

    def __call__(self, rows: RouterRows) -> Values:
        positive, negative = (
            self.stats.get(rows.layer, f"prompts.{kind}").astype(np.float64)
            for kind in ("positive", "negative")
        )
        return _unit(positive - negative) * _norm(rows, self._scale)


@register_router("ridge")
def ridge(stats: str, penalty: float = 0.01, scale: float | None = None) -> RouterInitializer:
    """Regress from which source of text an input is, in closed form.

    W = (XᵀX + penalty·I)⁻¹ XᵀY for inputs X and indicators Y. The paper's regression has a
    constant, which becomes a bias; Megatron's router has none.

    Row r is that of source r mod the number of sources; with several dense checkpoints, experts and
    sources are in the same order. A further row of a source is the same plus 1% of a random row:
    equal logits would give all tokens to the first of them, and mix the shards of copies.

    Args:
        stats: File of statistics of two sources or more, with --second-moment full.
        penalty: Added to the diagonal of XᵀX; the paper's code has 0.01.
        scale: Length of the rows; None takes that of random rows. The paper's rows have length 1,
            and its softmax has temperature 0.1, which is scale=10 here.

    Source: arXiv 2603.29765.
    """
    check_positive("ridge", "penalty", penalty)
    return _Ridge(Statistics.named("ridge", stats), penalty, _checked("ridge", scale))


class _Ridge:
    def __init__(self, stats: Statistics, penalty: float, scale: float | None) -> None:
        self.stats, self._penalty, self._scale = stats, penalty, scale

    def check(self, target: Target) -> None:
        self.stats.check(target)
        sources = len(self.stats.manifest["texts"])
        if sources < 2:
            raise UpcyclingError(
                f"{self.stats.file} is of {sources} source of text; expected two or more, which "
                "the router is to tell apart: calibrate with several --text."
            )
        if (moment := self.stats.manifest["second_moment"]) != "full":
            raise UpcyclingError(
                f"{self.stats.file} has the second moment {moment!r}; ridge needs the whole: "
                "calibrate with --second-moment full."
            )

    def __call__(self, rows: RouterRows) -> Values:
        counts = [text["tokens"] for text in self.stats.manifest["texts"]]
        moment = self.stats.get(rows.layer, "input.second_moment").astype(np.float64)
        of_sources = np.stack(
            [
                count * self.stats.get(rows.layer, f"sources.{source}.input.mean").astype(float)
                for source, count in enumerate(counts)
            ]
        )
        gram = sum(counts) * moment + self._penalty * np.eye(rows.hidden_size)
        solved = _unit(_solve(gram, of_sources.T).T) * _norm(rows, self._scale)
        values = solved[np.arange(rows.count) % len(counts)]
        further = np.arange(rows.count) >= len(counts)
        values[further] += _APART * _norm(rows, self._scale) * _unit(rows.normal())[further]
        return values


def _solve(matrix: Values, right: Values) -> Values:
    """Solve a linear system with one thread."""
    import torch

    try:
        with one_thread():
            solved = torch.linalg.solve(torch.from_numpy(matrix), torch.from_numpy(right))
    except RuntimeError as error:
        raise UpcyclingError(
            f"ridge: the inputs' second moment cannot be inverted ({error}). Give a larger penalty."
        ) from error
    return np.asarray(solved.numpy())


def _unit(values: Values) -> Values:
    """Return rows of length 1; a row of zeros stays."""
    lengths = np.sqrt(np.square(values).sum(1, keepdims=True))
    return values / np.where(lengths > 0, lengths, 1)


def _norm(rows: RouterRows, scale: float | None) -> float:
    return rows.norm if scale is None else scale


def _checked(name: str, scale: float | None) -> float | None:
    if scale is not None:
        check_positive(name, "scale", scale)
    return scale

"""Expert initialisers: functions that change a block of neurons copied from the dense layer."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.initializers.neurons import Neurons
from nemo_upcycle.initializers.options import check_fraction, check_positive
from nemo_upcycle.initializers.registry import Initializer, register
from nemo_upcycle.initializers.statistics import Statistics, Target


@register("copy")
def copy() -> Initializer:
    """Leave the dense layer's neurons as they are (arXiv 2412.09952 §3)."""
    return _copy


def _copy(neurons: Neurons) -> None: ...


@register("noise")
def noise(std: float = 0.02, fraction: float = 0.5) -> Initializer:
    """Add Gaussian noise to some weights, as in OLMoE's upcycling ablation (arXiv 2409.02060).

    Args:
        std: Standard deviation of the noise.
        fraction: Probability that a weight is changed.
    """
    check_positive("noise", "std", std)
    check_fraction("noise", "fraction", fraction)

    def initialize(neurons: Neurons) -> None:
        for part, values in neurons.values.items():
            added = neurons.normal(part) * std
            values += added * (neurons.uniform(part) < fraction)

    return initialize


@register("drop")
def drop(ratio: float = 0.5) -> Initializer:
    """Redraw ⌊ratio·F⌋ of each expert's F neurons: gate, up and down together.

    Values are normal, with the mean and standard deviation of the layer's dense gate, up or down,
    which are read once more for these statistics.

    Args:
        ratio: Fraction of the neurons to redraw.

    Source: Drop-Upcycling, arXiv 2502.19261 §3.
    """
    check_fraction("drop", "ratio", ratio)

    def initialize(neurons: Neurons) -> None:
        dropped = neurons.choose(ratio)
        for part, values in neurons.values.items():
            mean, std = neurons.statistics(part)
            values[dropped] = mean + std * neurons.normal(part, dropped)

    return initialize


@register("random")
def random(std: float | None = None) -> Initializer:
    """Draw all weights as Megatron initialises a model, so that nothing of the dense layer is left.

    Args:
        std: Standard deviation of gate and up; down has std/√(2·layers). None takes the dense
            model's `init_method_std`.
    """
    if std is not None:
        check_positive("random", "std", std)

    def initialize(neurons: Neurons) -> None:
        of_input = neurons.init_method_std if std is None else std
        for part, values in neurons.values.items():
            of_part = of_input / math.sqrt(2 * neurons.num_layers) if part == "down" else of_input
            values[:] = neurons.normal(part) * of_part

    return initialize


@register("hybrid")
def hybrid(*initializers: Initializer) -> Initializer:
    """Give each copy of the layer one of several initialisers, in turn.

    Args:
        initializers: Initialisers of the first copy of the layer, the second, …, and again from
            the first. For granularity 1 a copy is an expert.
    """
    if not initializers or not all(callable(each) for each in initializers):
        raise UpcyclingError(
            "hybrid() expects initializers, such as hybrid(copy, drop(ratio=0.3))."
        )
    return _Hybrid(initializers)


class _Hybrid:
    def __init__(self, initializers: Sequence[Initializer]) -> None:
        self._initializers = initializers

    def check(self, target: Target) -> None:
        for each in self._initializers:
            if hasattr(each, "check"):
                each.check(target)

    def __call__(self, neurons: Neurons) -> None:
        self._initializers[neurons.copy % len(self._initializers)](neurons)


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
        self._stats = stats

    def check(self, target: Target) -> None:
        self._stats.check(target)

    def __call__(self, neurons: Neurons) -> None:
        order = _most_active(self._stats, neurons)[neurons.ids.start : neurons.ids.stop]
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
        self._stats, self._shared = stats, shared

    def check(self, target: Target) -> None:
        self._stats.check(target)

    def __call__(self, neurons: Neurons) -> None:
        order = _most_active(self._stats, neurons)
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

"""Expert initializers: functions that change a block of neurons copied from the dense layer."""

import math
from collections.abc import Sequence

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.initializers.neurons import Neurons
from nemo_upcycle.initializers.options import check_fraction, check_positive
from nemo_upcycle.initializers.registry import Initializer, register
from nemo_upcycle.initializers.statistics import Target


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
    """Draw all weights as Megatron initializes a model, so that nothing of the dense layer is left.

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
    """Give each copy of the layer one of several initializers, in turn.

    Args:
        initializers: Initializers of the first copy of the layer, the second, …, and again from
            the first. For granularity 1 a copy is an expert.
    """
    if not initializers or not all(callable(each) for each in initializers):
        raise UpcyclingError(
            "hybrid() expects initializers, such as hybrid(copy, drop(ratio=0.3))."
        )
    return _Hybrid(initializers)


class _Hybrid:
    def __init__(self, initializers: Sequence[Initializer]) -> None:
        self.parts = initializers

    def check(self, target: Target) -> None:
        for each in self.parts:
            if hasattr(each, "check"):
                each.check(target)

    def __call__(self, neurons: Neurons) -> None:
        self.parts[neurons.copy % len(self.parts)](neurons)

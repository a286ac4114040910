"""A block of neurons of one expert, which an expert initializer changes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_upcycle.initializers.random import generators

Values = npt.NDArray[np.float32]
Statistics = Callable[[str], tuple[float, float]]
Read = Callable[[str, npt.NDArray[np.int64]], Values]

_PARTS = {"gate": 0, "up": 1, "down": 2}
_NORMAL, _UNIFORM, _CHOICE = 2, 5, 8
_STREAMS_OF_A_DRAW = 16


@dataclass(frozen=True)
class Neurons:
    """Some neurons of one expert, copied from the dense feed-forward layer.

    Neuron i is row i of gate, row i of up and column i of down. An initializer changes the values
    in place. Which neurons form a block depends on the parallel mapping, but a neuron's new values
    must not; therefore random values come from this class.

    Attributes:
        layer: Global layer, from 0.
        expert: Global expert, from 0.
        copy: The copy of the dense layer that the expert belongs to; the expert itself for
            granularity 1.
        ids: The neurons' numbers in the dense layer.
        expert_ids: The numbers of all neurons of the expert.
        values: `gate` (unless the layer has none), `up` and `down`, each [neurons, hidden].
        init_method_std: Standard deviation of random weights in the dense model's config.
        num_layers: Layers of the model.
        seed: Seed of all draws.
        dense_statistics: See `statistics`.
        dense_neurons: See `dense`.
    """

    layer: int
    expert: int
    copy: int
    ids: range
    expert_ids: range
    values: Mapping[str, Values]
    init_method_std: float
    num_layers: int
    seed: int
    dense_statistics: Statistics
    dense_neurons: Read

    def dense(self, part: str, ids: npt.NDArray[np.int64]) -> Values:
        """Return neurons of the whole dense layer, [neurons, hidden].

        The parts of the layer are read once more, and held in memory one layer at a time.

        Args:
            part: `gate`, `up` or `down`.
            ids: The neurons' numbers in the dense layer, in any order.
        """
        return self.dense_neurons(part, ids)

    def statistics(self, part: str) -> tuple[float, float]:
        """Return mean and standard deviation of the layer's whole dense gate, up or down."""
        return self.dense_statistics(part)

    def normal(
        self, part: str, rows: npt.NDArray[np.bool_] | None = None, draw: int = 0
    ) -> npt.NDArray[np.float64]:
        """Draw standard normal values.

        Args:
            part: `gate`, `up` or `down`.
            rows: Mask or indices of the neurons to draw for; None for all.
            draw: Number of the draw, if an initializer needs several.

        Returns:
            [neurons, hidden]
        """
        return self._draw("standard_normal", _NORMAL, part, rows, draw)

    def uniform(
        self, part: str, rows: npt.NDArray[np.bool_] | None = None, draw: int = 0
    ) -> npt.NDArray[np.float64]:
        """Draw values from 0 to 1; see `normal`."""
        return self._draw("random", _UNIFORM, part, rows, draw)

    def choose(self, fraction: float, draw: int = 0) -> npt.NDArray[np.bool_]:
        """Choose ⌊fraction · all neurons of the expert⌋ neurons at random.

        Args:
            fraction: From 0 to 1.
            draw: Number of the draw, if an initializer needs several.

        Returns:
            Mask of the chosen neurons in this block.
        """
        count = len(self.expert_ids)
        stream = _CHOICE + _STREAMS_OF_A_DRAW * draw
        source = next(generators(self.seed, stream, self.layer, self.expert, [0]))
        chosen = np.zeros(count, bool)
        chosen[source.permutation(count)[: int(fraction * count)]] = True
        first = self.ids.start - self.expert_ids.start
        return chosen[first : first + len(self.ids)]

    def _draw(self, kind: str, stream: int, part: str, rows: Any, draw: int) -> Any:
        ids = np.arange(self.ids.start, self.ids.stop)
        stream += _PARTS[part] + _STREAMS_OF_A_DRAW * draw
        drawn = ids if rows is None else ids[rows]
        result = np.empty((len(drawn), self.values[part].shape[1]))
        sources = generators(self.seed, stream, self.layer, self.expert, drawn)
        for values, source in zip(result, sources, strict=True):
            getattr(source, kind)(out=values)
        return result

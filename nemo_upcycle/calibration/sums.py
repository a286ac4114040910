"""Sums over the tokens of a layer, added in an order that the number of processes does not change.

A source's sequences are cut into a fixed number of lanes. A process adds up a lane from its first
token to the last, in fp64, and the lanes are then added in order.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nemo_upcycle.calibration.layer import Seen

Arrays = dict[str, npt.NDArray[Any]]

NONE, DIAGONAL, FULL = "none", "diagonal", "full"
SECOND_MOMENTS = (NONE, DIAGONAL, FULL)
"""Second moments of inputs: [hidden], or [hidden, hidden], which is 64 MiB for 4,096."""

ACTIVE = 0.1
"""A neuron is active for a token if among this fraction of the token's largest activations."""


class Sums:
    """Sums over the tokens of a lane.

    Args:
        second_moment: Which second moment to add up.
    """

    def __init__(self, second_moment: str) -> None:
        self._second_moment = second_moment
        self._sums: dict[str, torch.Tensor] = {}
        self._sampled: list[torch.Tensor] = []

    def add(self, seen: Seen, sampled: npt.NDArray[np.int64]) -> None:
        """Add a sequence.

        Args:
            seen: What the layer computed.
            sampled: Tokens of the sequence whose inputs are kept, by number in the sequence.
        """
        inputs = seen.inputs
        self._add("input", inputs.double().sum(0))
        if self._second_moment == DIAGONAL:
            self._add("second_moment", inputs.double().square().sum(0))
        elif self._second_moment == FULL:
            self._add("second_moment", (inputs.T @ inputs).double())
        sizes = seen.neurons.abs()
        self._add("active", _active(sizes).double().sum(0))
        self._add("magnitude", sizes.double().sum(0))
        self._sampled.append(inputs[torch.from_numpy(sampled).to(inputs.device)].cpu())

    def arrays(self) -> Arrays:
        """Return the sums and the sampled inputs, by name."""
        sums = {name: values.cpu().numpy() for name, values in self._sums.items()}
        return {**sums, "sample": torch.cat(self._sampled).numpy()}

    def _add(self, name: str, values: torch.Tensor) -> None:
        if name in self._sums:
            self._sums[name] += values
        else:
            self._sums[name] = values


def _active(sizes: torch.Tensor) -> torch.Tensor:
    """Return which neurons are active for which tokens, [tokens, ffn]; never a neuron of size 0."""
    count = max(1, int(ACTIVE * sizes.shape[1]))
    chosen = torch.zeros_like(sizes, dtype=torch.bool)
    return chosen.scatter_(1, sizes.topk(count).indices, True) & (sizes > 0)


@dataclass(frozen=True)
class Totals:
    """The sums of a source, or of all sources.

    Attributes:
        tokens: Number of tokens.
        sums: Sums by name.
    """

    tokens: int
    sums: Mapping[str, npt.NDArray[np.float64]]

    @classmethod
    def of(cls, tokens: int, parts: Iterable[Mapping[str, npt.NDArray[Any]]]) -> "Totals":
        """Add parts in their order; sampled inputs are left out."""
        sums: dict[str, npt.NDArray[np.float64]] = {}
        for part in parts:
            for name in part.keys() - {"sample"}:
                values = part[name].astype(np.float64)
                sums[name] = sums[name] + values if name in sums else values
        return cls(tokens, sums)

    def means(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the means per token, by the names in a file of statistics."""
        return {
            _NAMES[name]: (values / self.tokens).astype(np.float32)
            for name, values in self.sums.items()
        }


_NAMES = {
    "input": "input.mean",
    "second_moment": "input.second_moment",
    "active": "neurons.rate",
    "magnitude": "neurons.magnitude",
}
"""Names of means in a file of statistics."""

"""The load of every expert at each measured step, in a file of the run's directory.

A line of JSON per measurement: `{"step": 10, "load": [[0.12, …], null, …]}`, each expert's share of
the assignments per layer, null for a layer without experts.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.files import write_whole

LOADS = "health/expert_load.jsonl"
"""The file in a run's directory. On a resume NeMo moves files that lie directly in there."""


@dataclass(frozen=True)
class Loads:
    """The load of all experts at a step.

    Attributes:
        step: Optimizer steps done.
        layers: Each expert's share of a layer's assignments; None for a layer without experts.
    """

    step: int
    layers: tuple[tuple[float, ...] | None, ...]

    @property
    def relative(self) -> dict[int, list[float]]:
        """Return each MoE layer's loads, relative to an even load of 1."""
        return {
            layer: [share * len(shares) for share in shares]
            for layer, shares in enumerate(self.layers)
            if shares is not None
        }


class LoadRecord:
    """Writes the file; only one rank may. Errors of the disk end the record, not the training.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._ended = path, False

    def begin(self, step: int) -> None:
        """Keep the measurements up to the step that training starts from, and drop later ones.

        A run that was killed has measured steps after its last checkpoint, which come again.

        Args:
            step: Optimizer steps done.
        """
        try:
            kept = [loads for loads in read_loads(self._path) if loads.step <= step]
        except UpcyclingError as error:
            warnings.warn(f"{error} The record starts anew.", stacklevel=2)
            kept = []
        try:
            write_whole(self._path, "".join(map(_line, kept)))
        except OSError as error:
            self._end(error)

    def add(self, loads: Loads) -> None:
        """Append a measurement."""
        if self._ended:
            return
        try:
            with self._path.open("a") as file:
                file.write(_line(loads))
        except OSError as error:
            self._end(error)

    def _end(self, error: OSError) -> None:
        self._ended = True
        warnings.warn(
            f"{self._path} cannot be written ({error.strerror or error}): the load of experts is "
            "not recorded from here on.",
            stacklevel=3,
        )


def read_loads(path: Path) -> list[Loads]:
    """Return the measurements of a run, in order; none if there is no file.

    Args:
        path: The file. A last line that a killed run has not finished does not count.

    Raises:
        UpcyclingError: The file is damaged.
    """
    try:
        *lines, _unfinished = path.read_text().split("\n")
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UpcyclingError(f"{path} cannot be read: {error}.") from error
    return [_parsed(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def thinned(loads: Sequence[Loads], most: int) -> Sequence[Loads]:
    """Return at most `most` measurements, at even distances from the first."""
    return loads[:: max(1, -(-len(loads) // most))]


def _line(loads: Loads) -> str:
    layers = [
        None if shares is None else [float(f"{share:.4g}") for share in shares]
        for shares in loads.layers
    ]
    return json.dumps({"step": loads.step, "load": layers}, separators=(",", ":")) + "\n"


def _parsed(line: str, place: str) -> Loads:
    try:
        found = json.loads(line)
        layers = tuple(
            None if shares is None else tuple(float(share) for share in shares)
            for shares in found["load"]
        )
        return Loads(int(found["step"]), layers)
    except (ValueError, KeyError, TypeError) as error:
        raise UpcyclingError(
            f"{place} is no measurement of the experts' load ({error!r}). The file is damaged: "
            "restore it, or remove it."
        ) from error

"""Read a file of statistics, which `calibrate` writes, and check that the file fits the model."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture

Values = npt.NDArray[np.float32]

FORMAT = 1
MANIFEST = "calibration"
"""Key of the manifest in the file's metadata."""

_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size")


@dataclass(frozen=True)
class Target:
    """The model that is made, as far as statistics must fit.

    Attributes:
        fingerprint: Of the dense weights; see `checkpoint.fingerprint`. It does not change with the
            fields of a config that this package knows.
        arch: The dense model's architecture.
        upcycling: What the feed-forward layers become.
    """

    fingerprint: str
    arch: Architecture
    upcycling: UpcyclingConfig


def read_manifest(file: Path) -> dict[str, Any]:
    """Return the manifest of a file of statistics.

    Raises:
        UpcyclingError: There is no such file, or the file holds something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as opened:
            manifest = json.loads((opened.metadata() or {})[MANIFEST])
    except FileNotFoundError:
        raise UpcyclingError(
            f"There is no file of statistics at {file}; `nemo-upcycle calibrate` writes one."
        ) from None
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UpcyclingError(
            f"{file} holds no statistics ({type(error).__name__}: {error}); expected a file that "
            "`nemo-upcycle calibrate` has written."
        ) from error
    if manifest.get("format") != FORMAT:
        raise UpcyclingError(
            f"{file} has format {manifest.get('format')}; this version reads {FORMAT}. Calibrate "
            "again."
        )
    return dict(manifest)


@dataclass(frozen=True)
class Statistics:
    """A file of statistics, opened when first used.

    Attributes:
        file: Path of the file.
    """

    file: Path

    @classmethod
    def named(cls, initializer: str, stats: object) -> "Statistics":
        """Return the statistics that an initializer's option names.

        Raises:
            UpcyclingError: The option is no path.
        """
        if not isinstance(stats, str | Path) or not str(stats):
            raise UpcyclingError(
                f"{initializer}: stats is {stats!r}; expected the path of a file that "
                "`nemo-upcycle calibrate` has written, in quotes."
            )
        return cls(Path(stats).expanduser())

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        """What the statistics were made of; see `read_manifest`."""
        return read_manifest(self.file)

    @property
    def digest(self) -> str:
        """A SHA-256 of the manifest, which determines the statistics."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    def check(self, target: Target) -> None:
        """Check that the statistics are of the dense checkpoint.

        Raises:
            UpcyclingError: They are of another, or there is no such file.
        """
        for name in _SIZES:
            found, expected = self.manifest[name], getattr(target.arch, name)
            if found != expected:
                raise UpcyclingError(
                    f"{self.file} is of a model with {name}={found}; the dense checkpoint has "
                    f"{expected}. Calibrate the checkpoint that is upcycled."
                )
        if self.manifest["fingerprint"] != target.fingerprint:
            raise UpcyclingError(
                f"{self.file} is of another dense checkpoint: the layers have the same sizes, but "
                "other weights, dtypes or names. Calibrate the checkpoint that is upcycled."
            )

    def check_clusters(self, expected: int, each: str) -> None:
        """Check the number of clusters per layer.

        Args:
            expected: Number that is needed.
            each: What a cluster is for.

        Raises:
            UpcyclingError: There are more or fewer.
        """
        found = self.manifest["clusters"]
        if found != expected:
            raise UpcyclingError(
                f"{self.file} has {found} clusters per layer; expected {expected}, one per {each}. "
                f"Calibrate with --clusters {expected}."
            )

    def get(self, layer: int, name: str) -> Values:
        """Return a statistic of a layer.

        Args:
            layer: Global layer, from 0.
            name: Such as `input.mean`.

        Raises:
            UpcyclingError: The file does not have the statistic.
        """
        from safetensors import SafetensorError, safe_open

        self.manifest  # noqa: B018  (its errors are clearer)
        try:
            with safe_open(self.file, "numpy") as opened:
                return np.array(opened.get_tensor(f"layers.{layer}.{name}"), np.float32)
        except SafetensorError as error:
            raise UpcyclingError(
                f"{self.file} has no {name} of layer {layer} ({error}). Calibrate with the option "
                "that gives it; docs/calibrate.md lists them."
            ) from error


def digests(initializers: Iterable[object]) -> dict[str, str]:
    """Return the digests of the statistics that initializers read, by path.

    Files that are gone are left out: a resumed run does not need them.

    Args:
        initializers: Initializers, whose attribute `stats` is a `Statistics` if they read one, and
            whose `parts` are further initializers.
    """
    found: dict[str, str] = {}
    for each in initializers:
        found |= digests(getattr(each, "parts", ()))
        stats = getattr(each, "stats", None)
        if isinstance(stats, Statistics) and stats.file.exists():
            found[str(stats.file)] = stats.digest
    return found

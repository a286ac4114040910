"""Results of trainings, stored so that no training is repeated."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_upcycle.ablations.studies import Arm, most_sequences
from nemo_upcycle.checkpoint import is_checkpoint, open_checkpoint
from nemo_upcycle.checkpoint.fingerprint import fingerprint
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture, architecture_of
from nemo_upcycle.files import write_whole

FORMAT = 1
"""Version of the measurements; results of other versions are ignored."""

CORPORA = ("documentation", "sources")


@dataclass(frozen=True)
class Workspace:
    """The demo's directory: data, and the dense model to upcycle.

    Raises:
        UpcyclingError: A file is missing.
    """

    directory: Path

    def __post_init__(self) -> None:
        missing = [path for path in self._manifests if not path.is_file()]
        missing = missing or [
            self.data / name for name in self._files if not (self.data / name).is_file()
        ]
        if not is_checkpoint(self.dense):
            missing.append(self.dense)
        if missing:
            raise UpcyclingError(
                f"There is no {missing[0]}; expected the demo's data and dense checkpoint in "
                f"{self.directory}. `make demo` makes them in demo/; or give --dir."
            )

    @property
    def data(self) -> Path:
        """Directory of the corpora."""
        return self.directory / "data"

    @property
    def _manifests(self) -> list[Path]:
        return [self.data / f"{name}.manifest.json" for name in CORPORA]

    @property
    def _files(self) -> dict[str, Any]:
        """Size and checksum of each of Megatron's files, by name."""
        files: dict[str, Any] = {}
        for manifest in self._manifests:
            files |= json.loads(manifest.read_text())["files"]
        return files

    @property
    def dense(self) -> Path:
        """Directory of the dense checkpoint."""
        return self.directory / "dense_hf"

    @cached_property
    def architecture(self) -> Architecture:
        """The dense model's architecture."""
        config = open_checkpoint(str(self.dense)).config
        return architecture_of(config)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Fingerprints that identify the dense weights and the data, whatever their paths."""
        return {"dense": fingerprint(open_checkpoint(str(self.dense))), "data": self._files}


@dataclass(frozen=True)
class Job:
    """A training: an arm and a seed.

    Attributes:
        arm: The arm.
        seed: Seed for the order of the data, routers, initialisers and random weights.
        steps: Optimizer steps.
        samples: Number of sequences for which the data are shuffled: with equal numbers, equal
            seeds give the same sequences in the same order.
        workspace: The data and the dense checkpoint.
        results: Directory of the results.
    """

    arm: Arm
    seed: int
    steps: int
    samples: int
    workspace: Workspace
    results: Path

    @property
    def name(self) -> str:
        """Name of the training's files."""
        return f"{self.arm.name}-{self.seed}"

    @property
    def path(self) -> Path:
        """Path of the result's file."""
        return self.results / f"{self.name}.json"

    @cached_property
    def made_of(self) -> dict[str, Any]:
        """Everything that determines the result; the arm's name does not."""
        recipe = asdict(self.arm.recipe)
        return {
            "format": FORMAT,
            "start": self.arm.start,
            "recipe": recipe,
            "seed": self.seed,
            "steps": self.steps,
            "samples": self.samples,
            **self.workspace.identity,
        }

    @property
    def key(self) -> str:
        """A hash of everything that determines the result."""
        return hashlib.sha256(json.dumps(self.made_of, sort_keys=True).encode()).hexdigest()

    def result(self) -> "Result | None":
        """Return the stored result of this training; None if missing or of other settings."""
        try:
            kept = json.loads(self.path.read_text())
            return Result(**kept["result"]) if kept["key"] == self.key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, result: "Result") -> None:
        """Write the result atomically."""
        kept = {"arm": self.arm.name, "key": self.key, "result": asdict(result)}
        write_whole(self.path, json.dumps(kept | {"made_of": self.made_of}, indent=1) + "\n")


@dataclass(frozen=True)
class Result:
    """Losses on held-out text, in nats per token.

    Attributes:
        start: Before the first step, without dropped tokens.
        end: After the last step, without dropped tokens.
        capped_start: Before the first step, with the training's capacity factor.
        capped_end: After the last step, with the training's capacity factor.
        dropped: Share of the assignments that the capacity factor drops, after the last step.
        held_out_tokens: Number of predicted tokens.
        seconds: Processor seconds of the training.
    """

    start: float
    end: float
    capped_start: float
    capped_end: float
    dropped: float
    held_out_tokens: int
    seconds: float


def jobs_of(
    arms: list[Arm], seeds: int, steps: int, workspace: Workspace, results: Path
) -> list[Job]:
    """Return all trainings, seed by seed.

    Args:
        arms: The arms.
        seeds: Number of seeds per arm; the first seed is 1.
        steps: Number of steps of the baseline.
        workspace: The data and the dense checkpoint.
        results: Directory of the results.
    """
    arch = workspace.architecture
    # Over all studies, so that the number does not depend on the selected studies.
    samples = most_sequences(steps, arch)
    return [
        Job(arm, seed, arm.steps(steps, arch), samples, workspace, results)
        for seed in range(1, seeds + 1)
        for arm in arms
    ]

"""What a training came to, kept so that it is not done again."""

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
"""Counts up when what is measured changes: results from before are then not taken."""

CORPORA = ("documentation", "sources")


@dataclass(frozen=True)
class Workspace:
    """The demo's directory: data, and the dense model that is upcycled.

    Raises:
        UpcyclingError: Something is not there.
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
        """Where the corpora are."""
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
        """The dense checkpoint."""
        return self.directory / "dense_hf"

    @cached_property
    def architecture(self) -> Architecture:
        """The dense model's architecture."""
        config = open_checkpoint(str(self.dense)).config
        return architecture_of(config)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What tells the dense weights and the data from others, wherever they lie."""
        return {"dense": fingerprint(open_checkpoint(str(self.dense))), "data": self._files}


@dataclass(frozen=True)
class Job:
    """A training to do: an arm and a seed.

    Attributes:
        arm: What is trained.
        seed: Of the order of the data, of routers, initialisers and random weights.
        steps: Optimizer steps.
        samples: Sequences that the data are shuffled for: with the same number, the same seed
            gives the same sequences in the same order.
        workspace: Where data and dense checkpoint are.
        results: Where the result is kept.
    """

    arm: Arm
    seed: int
    steps: int
    samples: int
    workspace: Workspace
    results: Path

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.arm.name}-{self.seed}"

    @property
    def path(self) -> Path:
        """Its result's file."""
        return self.results / f"{self.name}.json"

    @cached_property
    def made_of(self) -> dict[str, Any]:
        """All that decides the result; not what the arm is called."""
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
        """A hash of what decides the result."""
        return hashlib.sha256(json.dumps(self.made_of, sort_keys=True).encode()).hexdigest()

    def result(self) -> "Result | None":
        """Return what this very training came to, if it has been done."""
        try:
            kept = json.loads(self.path.read_text())
            return Result(**kept["result"]) if kept["key"] == self.key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, result: "Result") -> None:
        """Write the result, whole or not at all."""
        kept = {"arm": self.arm.name, "key": self.key, "result": asdict(result)}
        write_whole(self.path, json.dumps(kept | {"made_of": self.made_of}, indent=1) + "\n")


@dataclass(frozen=True)
class Result:
    """Losses on held-out text, in nats per token.

    Attributes:
        start: Before the first step, with no token dropped.
        end: After the last, with no token dropped.
        capped_start: Before the first, with the capacity factor of the training.
        capped_end: After the last, with that.
        dropped: Share of the assignments that the capacity factor drops, after the last step.
        held_out_tokens: Tokens that were asked for.
        seconds: Of the training's processor.
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
        arms: What is trained.
        seeds: Seeds of each, from 1.
        steps: Of the baseline.
        workspace: Where data and dense checkpoint are.
        results: Where results are kept.
    """
    arch = workspace.architecture
    # Of all studies, so that it does not depend on which are asked for.
    samples = most_sequences(steps, arch)
    return [
        Job(arm, seed, arm.steps(steps, arch), samples, workspace, results)
        for seed in range(1, seeds + 1)
        for arm in arms
    ]

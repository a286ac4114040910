"""Results of trainings, stored so that no training is repeated."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_upcycle_recipes.recipe import Recipe

from nemo_upcycle.ablations.arms import Arm
from nemo_upcycle.ablations.prompts import PROMPTS
from nemo_upcycle.ablations.studies import most_sequences
from nemo_upcycle.checkpoint import is_checkpoint, open_checkpoint
from nemo_upcycle.checkpoint.fingerprint import fingerprint
from nemo_upcycle.data.paths import DataPath
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture, architecture_of
from nemo_upcycle.files import write_whole

FORMAT = 2
"""Version of the measurements; results of other versions are ignored."""

OVER_TIME = (
    "router_confidence",
    "router_entropy",
    "expert_load_cv",
    "dead_experts",
    "expert_distance",
)
"""What is measured of routers and experts; see `MoEHealth`."""

CALIBRATION: dict[str, Any] = {"tokens": 100_000, "clusters": 8}
"""Options of the calibrations whose statistics arms read; see `ablations.inputs` for the others."""

DEMO = (("documentation", 0.7), ("sources", 0.3))
"""The demo's corpora and their shares."""


@dataclass(frozen=True)
class Workspace:
    """The data, and the dense model to upcycle.

    Attributes:
        directory: The demo's directory, which has both; else the directory of what was prepared.
        dense: Directory of the dense checkpoint; None for the demo's.
        paths: The data, each with a weight; empty for the demo's.
        items: Questions of the task `next_line`, as `data choices` writes them; None for no task.

    Raises:
        UpcyclingError: A file is missing.
    """

    directory: Path
    dense: Path = None  # type: ignore[assignment]
    paths: tuple[DataPath, ...] = ()
    items: Path | None = None

    def __post_init__(self) -> None:
        if self.dense is None:
            object.__setattr__(self, "dense", self.directory / "dense_hf")
        if not self.paths:
            data = [DataPath(f"{self.directory}/data/{name}", share) for name, share in DEMO]
            object.__setattr__(self, "paths", tuple(data))
        missing = [path for path in self._manifests if not path.is_file()]
        missing = missing or [
            path.file(".bin").with_name(name)
            for path, manifest in zip(self.paths, self._manifests, strict=True)
            for name in _files_of(manifest)
            if not path.file(".bin").with_name(name).is_file()
        ]
        if not is_checkpoint(self.dense):
            missing.append(self.dense)
        if missing:
            raise UpcyclingError(
                f"There is no {missing[0]}; expected the demo's data and dense checkpoint in "
                f"{self.directory}. `make demo` makes them in demo/; or give --dir. For a recipe "
                "give --dense, and --data with data that `nemo-upcycle data tokenize` made."
            )

    @property
    def _manifests(self) -> list[Path]:
        return [path.file(".manifest.json") for path in self.paths]

    @property
    def _files(self) -> dict[str, Any]:
        """Size and checksum of each of Megatron's files, by name."""
        files: dict[str, Any] = {}
        for manifest in self._manifests:
            files |= _files_of(manifest)
        return files

    @cached_property
    def architecture(self) -> Architecture:
        """The dense model's architecture."""
        config = open_checkpoint(str(self.dense)).config
        return architecture_of(config)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Fingerprints that identify the dense weights and the data, whatever their paths."""
        found = {"dense": fingerprint(open_checkpoint(str(self.dense))), "data": self._files}
        if self.items is not None:
            found["items"] = hashlib.sha256(self.items.read_bytes()).hexdigest()
        return found


def _files_of(manifest: Path) -> dict[str, Any]:
    return json.loads(manifest.read_text())["files"]


@dataclass(frozen=True)
class Job:
    """A training: an arm and a seed.

    Attributes:
        arm: The arm.
        seed: Seed for the order of the data, routers, initializers and random weights.
        steps: Optimizer steps.
        samples: Number of sequences for which the data are shuffled: with equal numbers, equal
            seeds give the same sequences in the same order.
        workspace: The data and the dense checkpoint.
        results: Directory of the results.
        statistics: File of statistics, for arms that need one; see `ablations.inputs`.
        branches: Trainings whose weights are mixed, for arms that mix some.
        weights: Directory for the trained weights, as a dense checkpoint; None keeps none.
    """

    arm: Arm
    seed: int
    steps: int
    samples: int
    workspace: Workspace
    results: Path
    statistics: Path | None = None
    branches: tuple["Job", ...] = ()
    weights: Path | None = None

    @property
    def dense_checkpoint(self) -> str:
        """The dense checkpoint that is upcycled; several for an arm that mixes some."""
        mixed = [branch.weights for branch in self.branches]
        return "; ".join(map(str, mixed or [self.workspace.dense]))

    @property
    def name(self) -> str:
        """Name of the training's files."""
        return f"{self.arm.name}-{self.seed}"

    @property
    def path(self) -> Path:
        """Path of the result's file."""
        return self.results / f"{self.name}.json"

    @property
    def recipe(self) -> Recipe:
        """The arm's recipe; with fewer steps than the recipe's, a shorter warm-up."""
        recipe = self.arm.recipe
        if self.arm.base.is_tiny:  # whose steps are chosen for its warm-up
            return recipe
        warm_up = min(recipe.schedule.warmup_steps, self.steps // 10)
        return replace(recipe, schedule=replace(recipe.schedule, warmup_steps=warm_up))

    @property
    def flops(self) -> float:
        """The training's FLOPs, forward and backward."""
        return self.steps * self.arm.flops_per_step(self.workspace.architecture)

    @cached_property
    def made_of(self) -> dict[str, Any]:
        """Everything that determines the result; the arm's name does not."""
        made_of = {
            "format": FORMAT,
            "start": self.arm.start,
            "recipe": asdict(self.recipe),
            "seed": self.seed,
            "steps": self.steps,
            "samples": self.samples,
            **self.workspace.identity,
        }
        if self.arm.router_warmup_steps:
            made_of["router_warmup_steps"] = self.arm.router_warmup_steps
        if self.arm.needs_statistics:
            made_of["statistics"] = CALIBRATION | {"prompts": PROMPTS}
        if self.branches:
            made_of["branches"] = [branch.key for branch in self.branches]
        base = self.arm.base
        if not base.is_tiny:
            made_of |= {"accelerator": base.accelerator, "rows": base.rows}
            made_of |= {"paths": [path.weight for path in self.workspace.paths]}
        return made_of

    @property
    def key(self) -> str:
        """A hash of everything that determines the result."""
        return hashlib.sha256(json.dumps(self.made_of, sort_keys=True).encode()).hexdigest()

    def result(self) -> "Result | None":
        """Return the stored result of this training; None if missing or of other settings."""
        if self.weights is not None and not is_checkpoint(self.weights):
            return None
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
        start_accuracy: Accuracy in the task `next_line` before the first step, if it was asked.
        end_accuracy: The same after the last step.
        over_time: Before the first step, halfway and after the last step, on held-out text: `loss`,
            and for an MoE `OVER_TIME`, dead experts in all layers, else means over the layers.
        step_seconds: Median time per step, of all but the first two.
        other_seconds: Time of everything else, from the start of the process.
    """

    start: float
    end: float
    capped_start: float
    capped_end: float
    dropped: float
    held_out_tokens: int
    seconds: float
    start_accuracy: float | None = None
    end_accuracy: float | None = None
    over_time: dict[str, list[float]] = field(default_factory=dict)
    step_seconds: float | None = None
    other_seconds: float | None = None

    def value(self, of: str, at: str) -> float:
        """Return what a claim is about: `of` and `at` as in `Claim`."""
        if of == "loss":
            return float(getattr(self, at))
        return self.over_time[of][0 if at == "start" else -1]


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
    samples = most_sequences(steps, arch, arms[0].base)
    return [
        Job(arm, seed, arm.steps(steps, arch), samples, workspace, results)
        for seed in range(1, seeds + 1)
        for arm in arms
    ]

"""What may change between a run's starts, and what may not."""

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.distributed.nursery import Nursery
from tests.distributed.test_training import EP2, FOLDED, train
from tests.workspace import make_workspace

STEPS, STOPPED = 4, 2
OVERRIDES = {
    "trainer.limit_val_batches": 0,
    "data.global_batch_size": 8,
    "data.micro_batch_size": 2,
}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}

MAPPINGS: dict[str, tuple[int, dict[str, int]]] = {
    "1 rank": (1, {}),
    "DP2": (2, {}),
    "TP2": (2, TP2),
    "TP2 ETP2": (2, TP2 | {"expert_tensor_parallel_size": 2}),
    "PP2": (2, PP2),
    "PP2 VPP2": (2, PP2 | {"virtual_pipeline_model_parallel_size": 2}),
    "EP4": (4, {"expert_model_parallel_size": 4}),
    "TP2 PP2 EP2": (4, FOLDED),
}


class Runs:
    """Runs of the tiny recipe on 2 ranks, and what they can be resumed as."""

    def __init__(self, nursery: Nursery, workspace: Path) -> None:
        self.nursery, self.workspace = nursery, workspace

    def start(
        self,
        directory: Path,
        world_size: int = 2,
        options: dict[str, Any] | None = None,
        overrides: dict[str, Any] | None = None,
        accident: tuple[str, dict[str, Any]] | None = None,
        factory: str = "upcycled_recipe",
    ) -> tuple[list[Any], str]:
        """Start `directory/run`; return each rank's losses or error, and what rank 0 said."""
        for part in ("data", "tokenizer", "dense_hf"):
            if not (directory / part).exists():
                (directory / part).symlink_to(self.workspace / part)
        run = self.nursery.start(
            train,
            world_size,
            directory=directory,
            options={"name": "run", "max_steps": STEPS, **(EP2 if options is None else options)},
            overrides=OVERRIDES | (overrides or {}),
            accident=accident,
            factory=factory,
        )
        assert run.wait() == [0] * world_size, run.said(0)[-3000:]
        results = [run.result(rank) for rank in range(world_size)]
        return [r if isinstance(r, str) else r[0] for r in results], run.said(0)


@pytest.fixture(scope="module")
def runs(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(nursery, make_workspace(tmp_path_factory.mktemp("workspace")))


@pytest.fixture(scope="module")
def stopped(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has stopped half-way."""
    directory = tmp_path_factory.mktemp("stopped")
    runs.start(directory, accident=("StopAfter", {"step": STOPPED}))
    return directory / "run"


@pytest.fixture
def resumable(stopped: Path, tmp_path: Path) -> Path:
    """A directory with a copy of it."""
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path


@pytest.fixture(scope="module")
def expected(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run that was not stopped."""
    losses, _ = runs.start(tmp_path_factory.mktemp("uninterrupted"))
    assert losses[0] == losses[1]
    return losses[0]


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_a_run_goes_on_under_another_mapping(
    runs: Runs, resumable: Path, expected: list[float], mapping: str
) -> None:
    world_size, folding = MAPPINGS[mapping]
    losses, said = runs.start(resumable, world_size, folding)
    assert "not upcycling again" in said
    # NeMo gives the loss to all ranks but those of the last stage that are not its first.
    assert losses[0] == pytest.approx(expected[STOPPED:], rel=1e-5)


def test_a_run_goes_on_with_other_micro_batches(
    runs: Runs, resumable: Path, expected: list[float]
) -> None:
    """The auxiliary loss is taken over a micro-batch: what follows is near, not equal."""
    losses, _ = runs.start(resumable, overrides={"data.micro_batch_size": 1})
    assert losses[0] == pytest.approx(expected[STOPPED:], rel=1e-4)


def test_a_run_gets_more_steps(runs: Runs, resumable: Path) -> None:
    losses, _ = runs.start(resumable, options=EP2 | {"max_steps": STEPS + 1})
    assert len(losses[0]) == STEPS + 1 - STOPPED


def test_another_global_batch_size_is_refused(runs: Runs, resumable: Path) -> None:
    """NeMo itself would train for ever."""
    errors, _ = runs.start(resumable, overrides={"data.global_batch_size": 4})
    assert len(set(errors)) == 1
    assert "16 samples in 2 steps; now global_batch_size=4" in errors[0]


def test_a_changed_dense_checkpoint_is_refused(runs: Runs, resumable: Path) -> None:
    """And the original makes the same command work again."""
    original = runs.workspace / "dense_hf"
    changed = Path(shutil.copytree(original, resumable / "dense_hf"))
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0] += 1
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    errors, _ = runs.start(resumable)
    assert len(set(errors)) == 1
    assert f"the weights in {changed} are others or were changed since" in errors[0]
    shutil.copy(original / "model.safetensors", changed)
    losses, _ = runs.start(resumable)
    assert len(losses[0]) == STEPS - STOPPED


def test_the_dense_weights_may_be_gone(runs: Runs, resumable: Path) -> None:
    weights = "model.safetensors"
    dense = runs.workspace / "dense_hf"
    shutil.copytree(dense, resumable / "dense_hf", ignore=shutil.ignore_patterns(weights))
    losses, said = runs.start(resumable)
    assert len(losses[0]) == STEPS - STOPPED
    assert "the resume does not need the dense checkpoint" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_moe_experts": 4}, "num_moe_experts=8; now num_moe_experts=4"),
        ({"moe_router_topk": 4}, "moe_router_topk=2; now moe_router_topk=4"),
        ({"moe_router_pre_softmax": True}, "moe_router_pre_softmax=False; now"),
        ({"seed": 7}, "seed=1234; now seed=7"),
        ({"initializer": "drop"}, "initializer=copy; now initializer=drop"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_upcycling_is_refused(
    runs: Runs, resumable: Path, change: dict[str, Any], message: str
) -> None:
    errors, _ = runs.start(resumable, options=EP2 | change)
    assert len(set(errors)) == 1
    assert errors[0].startswith("UpcyclingError: ")
    assert message in errors[0]
    assert "another name for a new run" in errors[0]


def test_the_capacity_factor_may_change(runs: Runs, resumable: Path) -> None:
    losses, _ = runs.start(resumable, options=EP2 | {"moe_expert_capacity_factor": 4.0})
    assert len(losses[0]) == STEPS - STOPPED


def test_a_damaged_checkpoint_of_the_run_is_an_error(runs: Runs, resumable: Path) -> None:
    (common,) = resumable.glob("run/checkpoints/*/weights/common.pt")
    common.write_bytes(common.read_bytes()[:-500])
    errors, _ = runs.start(resumable)
    assert len(set(errors)) == 1
    assert "cannot be resumed from" in errors[0]
    shutil.rmtree(common.parent.parent)
    losses, said = runs.start(resumable)
    assert "starting anew" in said
    assert len(losses[0]) == STEPS


def test_a_run_that_is_at_its_end_says_so(runs: Runs, resumable: Path) -> None:
    errors, _ = runs.start(resumable, options=EP2 | {"max_steps": STOPPED})
    assert len(set(errors)) == 1
    assert f"The run has made all its steps: {resumable}" in errors[0]


def test_a_dense_checkpoint_in_the_runs_own_directory_is_refused(
    runs: Runs, tmp_path: Path
) -> None:
    """NeMo would move its files away."""
    dense = Path(shutil.copytree(runs.workspace / "dense_hf", tmp_path / "run"))
    before = sorted(file.name for file in dense.iterdir())
    errors, _ = runs.start(tmp_path, options=EP2 | {"dense_checkpoint": str(dense)})
    assert len(set(errors)) == 1
    assert "lies in the run's own directory" in errors[0]
    assert set(before) <= {file.name for file in dense.iterdir()}


def rates(said: str) -> list[tuple[float, float, str]]:
    """Return learning rate, weight decay and betas of each step."""
    lines = re.findall(r"^\[rates\] (\S+) (\S+) (.+)$", said, re.MULTILINE)
    return [(float(lr), float(decay), betas) for lr, decay, betas in lines]


def cosine(step: int, lr: float, min_lr: float, warmup: int, steps: int) -> float:
    """Return the recipes' learning rate."""
    if step <= warmup:
        return lr * (step + 1) / (warmup + 1)
    part = (step - warmup) / (steps - warmup)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * part))


LR = ("optim.config.lr", "optim.lr_scheduler.min_lr", "optim.lr_scheduler.warmup_steps")
TAKEN: dict[str, tuple[dict[str, Any], str, tuple[float, float, int, int]]] = {
    "learning rate": (
        {"optim.config.lr": 1e-6},
        "[resume] optim.config.lr 0.003 → 1e-06",
        (1e-6, 3e-4, 20, STEPS + 2),
    ),
    "schedule": (
        dict(zip(LR, (1e-2, 1e-3, 1), strict=True)),
        "[resume] optim.lr_scheduler.warmup_steps 20 → 1",
        (1e-2, 1e-3, 1, STEPS + 2),
    ),
    "weight decay and betas": (
        {"optim.config.weight_decay": 0.5, "optim.config.adam_beta2": 0.99},
        "[resume] optim.config.weight_decay 0.1 → 0.5",
        (3e-3, 3e-4, 20, STEPS + 2),
    ),
}


@pytest.mark.parametrize("change", TAKEN)
def test_a_run_takes_the_learning_rate_of_its_command(
    runs: Runs, resumable: Path, change: str
) -> None:
    """And that of a longer run: each step is made with what a fresh start would make it with."""
    overrides, line, schedule = TAKEN[change]
    losses, said = runs.start(
        resumable,
        options=EP2 | {"max_steps": STEPS + 2},
        overrides=overrides,
        accident=("SayRates", {}),
    )
    assert len(losses[0]) == STEPS + 2 - STOPPED
    assert line in said
    assert f"[resume] trainer.max_steps {STEPS} → {STEPS + 2}" in said
    steps = range(STOPPED, STEPS + 2)
    assert [lr for lr, _, _ in rates(said)] == pytest.approx(
        [cosine(step, *schedule) for step in steps]
    )
    decay = overrides.get("optim.config.weight_decay", 0.1)
    betas = str((0.9, overrides.get("optim.config.adam_beta2", 0.95)))
    assert {(decay, betas)} == {(found, pair) for _, found, pair in rates(said)}


MOE, DENSE = "an MoE of 8 experts, top-2 from", "a dense model from"
BEGINNINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "upcycled": ("upcycled_recipe", EP2 | {"dense_checkpoint": "dense_hf"}, f"{MOE} dense_hf"),
    "scratch": ("upcycled_recipe", EP2 | {"from_scratch": True}, f"{MOE} random weights"),
    "dense": ("dense_recipe", {"dense_checkpoint": "dense_hf"}, f"{DENSE} dense_hf"),
    "dense random": ("dense_recipe", {}, f"{DENSE} random weights"),
}


class Beginnings:
    """Runs of one name that begin in different ways."""

    def __init__(self, runs: Runs) -> None:
        self.runs, self.dense = runs, str(runs.workspace / "dense_hf")

    def start(self, directory: Path, beginning: str, max_steps: int) -> tuple[list[Any], str]:
        factory, options, _ = BEGINNINGS[beginning]
        given = options | {"max_steps": max_steps}
        if "dense_checkpoint" in given:
            given["dense_checkpoint"] = self.dense
        return self.runs.start(directory, options=given, factory=factory)

    def said(self, beginning: str) -> str:
        return BEGINNINGS[beginning][2].replace("dense_hf", self.dense)


@pytest.fixture(scope="module")
def beginnings(runs: Runs) -> Beginnings:
    return Beginnings(runs)


@pytest.fixture(scope="module")
def begun(beginnings: Beginnings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directories of runs that began in each way, and have made a step."""
    found = {}
    for name in BEGINNINGS:
        directory = tmp_path_factory.mktemp(name.replace(" ", "-"))
        losses, said = beginnings.start(directory, name, 1)
        assert len(losses[0]) == 1, said[-3000:]
        found[name] = directory / "run"
    return found


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("scratch", "upcycled"),
        ("upcycled", "scratch"),
        ("dense random", "dense"),
        ("dense", "dense random"),
        ("upcycled", "dense"),
        ("scratch", "dense random"),
        ("dense", "upcycled"),
        ("dense random", "scratch"),
    ],
)
def test_one_name_for_two_beginnings_is_refused(
    beginnings: Beginnings, begun: dict[str, Path], tmp_path: Path, before: str, now: str
) -> None:
    """Or a control would go on with the weights of what it is compared with."""
    shutil.copytree(begun[before], tmp_path / "run")
    errors, _ = beginnings.start(tmp_path, now, 2)
    assert len(set(errors)) == 1
    assert f"is {beginnings.said(before)}; the command says {beginnings.said(now)}" in errors[0]
    assert "another name for a new run" in errors[0]


@pytest.mark.parametrize("name", BEGINNINGS)
def test_the_same_beginning_goes_on(
    beginnings: Beginnings, begun: dict[str, Path], tmp_path: Path, name: str
) -> None:
    shutil.copytree(begun[name], tmp_path / "run")
    losses, said = beginnings.start(tmp_path, name, 2)
    assert len(losses[0]) == 1
    assert re.findall(r"^\[resume\] .* → .*$", said, re.MULTILINE) == [
        "[resume] trainer.max_steps 1 → 2"
    ]

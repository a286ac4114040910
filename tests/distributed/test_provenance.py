"""A run is what its command says, or is refused."""

import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.pool import RankPool
from tests.distributed.runs import OVERRIDES, STEPS, STOPPED, Runs
from tests.distributed.training import EP2, train
from tests.thorough import thorough_but


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


@pytest.mark.parametrize("change", thorough_but(TAKEN, "schedule"))
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


@pytest.mark.thorough
def test_restored_weights_are_told_from_others(
    beginnings: Beginnings, begun: dict[str, Path], tmp_path: Path
) -> None:
    """Neither the place of the weights counts, nor whether the weights are still there."""
    places = {}
    for name in ("upcycled", "scratch"):
        (found,) = begun[name].glob("checkpoints/*-last")
        places[name] = shutil.copytree(found, tmp_path / name)

    def start(source: Path, max_steps: int) -> list[Any]:
        return beginnings.runs.start(
            tmp_path,
            options=EP2 | {"from_scratch": True, "max_steps": max_steps},
            overrides={"resume.restore_config": str(source)},
        )[0]

    assert len(start(places["upcycled"], 1)[0]) == 1
    errors = start(places["scratch"], 2)
    assert len(set(errors)) == 1
    assert f"began from {places['upcycled']}; the weights in {places['scratch']}" in errors[0]
    moved = places["upcycled"].rename(tmp_path / "moved")
    assert len(start(moved, 2)[0]) == 1
    shutil.rmtree(moved)
    assert len(start(moved, 3)[0]) == 1


def test_a_context_that_is_extended_is_said(runs: Runs, tmp_path: Path) -> None:
    longer = {"data.seq_length": 512, "model.config.seq_length": 512}
    losses, said = runs.start(tmp_path, options=EP2 | {"max_steps": 1}, overrides=longer)
    assert len(losses[0]) == 1
    assert "[run] data.seq_length is 512, beyond the context of 256" in said


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "length": ({"data.seq_length": 128}, "data.seq_length=256; now data.seq_length=128"),
    "optimizer": ({"optim.config.optimizer": "sgd"}, "optim.config.optimizer=adam; now"),
    "state of the optimizer": (
        {"optim.config.use_distributed_optimizer": False},
        "optim.config.use_distributed_optimizer=True; now",
    ),
    "layers": ({"model.config.num_layers": 2}, "model.config.num_layers=4; now"),
    "RoPE": ({"model.config.rotary_base": 5e5}, "model.config.rotary_base=10000.0; now"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_a_run_cannot_change_is_refused(runs: Runs, resumable: Path, change: str) -> None:
    overrides, message = REFUSED[change]
    errors, _ = runs.start(resumable, overrides=overrides)
    assert len(set(errors)) == 1
    assert errors[0].startswith("UpcyclingError: ")
    assert f"was trained with {message}" in errors[0]
    assert "another name for a new run" in errors[0]


def another_tokenizer(runs: Runs, directory: Path) -> str:
    """Return one of the same size, in which two tokens have changed places."""
    tokenizer = Path(shutil.copytree(runs.workspace / "tokenizer", directory / "other"))
    file = tokenizer / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))
    return str(tokenizer)


def test_another_tokenizer_is_refused(runs: Runs, resumable: Path) -> None:
    """Even one of the same size: what the run has learnt of an id would be another token's."""
    tokenizer = another_tokenizer(runs, resumable)
    errors, _ = runs.start(resumable, options=EP2 | {"tokenizer": tokenizer})
    assert len(set(errors)) == 1
    assert "was made with another" in errors[0]  # the data say so, before the run does


def test_another_tokenizer_than_the_runs_is_refused(runs: Runs, resumable: Path) -> None:
    """Of data without a manifest, which say nothing, by what the run was trained with."""
    data = Path(shutil.copytree(runs.workspace / "data", resumable / "data"))
    for manifest in data.glob("*.manifest.json"):
        manifest.unlink()
    options = {"tokenizer": another_tokenizer(runs, resumable)}
    options["data_paths"] = f"0.7 {data / 'documentation'} 0.3 {data / 'sources'}"
    errors, _ = runs.start(resumable, options=EP2 | options)
    assert len(set(errors)) == 1
    assert "was trained with data.tokenizer=" in errors[0]


def test_what_a_run_can_change_is_said(runs: Runs, resumable: Path, expected: list[float]) -> None:
    losses, said = runs.start(
        resumable,
        options=EP2 | {"data_paths": str(runs.workspace / "data" / "documentation")},
        overrides={
            "data.seed": 7,
            "data.split": "900,50,50",
            "optim.config.clip_grad": 0.5,
            "model.config.moe_aux_loss_coeff": 0.0,
            "trainer.plugins.precision": "bf16-mixed",
        },
    )
    data = r"0.7 \S+/data/documentation 0.3 \S+/data/sources → \S+/data/documentation"
    changes = [
        f"data.paths {data}",
        "data.seed 1234 → 7",
        "data.split 970,20,10 → 900,50,50",
        r"model.config.moe_aux_loss_coeff 0.01 → 0.0",
        "optim.config.clip_grad 1.0 → 0.5",
        "trainer.plugins.precision 32-true → bf16-mixed",
    ]
    found = re.findall(r"^\[resume\] (.* → .*)$", said, re.MULTILINE)
    assert len(found) == len(changes), found
    for line, pattern in zip(found, changes, strict=True):
        assert re.fullmatch(pattern, line)
    assert losses[0] != pytest.approx(expected[STOPPED:], rel=1e-4)


@pytest.mark.thorough
def test_data_with_other_content_are_said(runs: Runs, resumable: Path) -> None:
    """A copy elsewhere is the same data, and nothing is said."""
    shutil.copytree(runs.workspace / "data", resumable / "data")
    losses, said = runs.start(resumable, options=EP2 | {"max_steps": STEPS - 1})
    assert len(losses[0]) == 1
    assert "data.paths" not in said
    for suffix in (".bin", ".idx"):
        shutil.copy(resumable / f"data/sources{suffix}", resumable / f"data/documentation{suffix}")
    (resumable / "data" / "documentation.manifest.json").unlink()  # which would refuse them
    shutil.rmtree(resumable / "data" / "cache", ignore_errors=True)
    losses, said = runs.start(resumable)
    assert len(losses[0]) == 1
    assert re.search(r"\[resume\] data.paths 0.7 \S+ 0.3 \S+: the content has changed since", said)


@pytest.mark.thorough
def test_checkpoints_of_an_older_version_are_taken_as_they_are(runs: Runs, resumable: Path) -> None:
    """A checkpoint of another model is an error of one line, not of a page per rank."""
    (common,) = resumable.glob("run/checkpoints/*/weights/common.pt")
    state = torch.load(common, weights_only=False)
    del state["callbacks"]["UpcyclingCallback"]
    torch.save(state, common)
    errors, said = runs.start(resumable, options={}, factory="dense_recipe")
    assert "does not say what the run was begun or trained with" in said
    for error in errors:
        assert error.startswith("UpcyclingError: ")
        assert "of another model than the command says" in error
        assert len(error.splitlines()) == 1
    losses, said = runs.start(resumable)
    assert "does not say what the run was begun or trained with" in said
    assert len(losses[0]) == STEPS - STOPPED


@pytest.mark.thorough
def test_a_copied_checkpoint_of_another_run(runs: Runs, resumable: Path) -> None:
    """Where it is alone the run goes on from it; beside the run's own it is left alone."""
    directory = (resumable / "run").rename(resumable / "branch")
    options = EP2 | {"name": "branch"}
    losses, said = runs.start(resumable, options=options | {"max_steps": STEPS - 1})
    assert len(losses[0]) == 1
    assert "was saved under another name: this run goes on from it" in said
    (own,) = (directory / "checkpoints").glob("branch--*-last")
    shutil.copytree(own, own.with_name(own.name.replace("branch--", "other--")))
    shutil.rmtree(next((directory / "checkpoints").glob("run--*-last")))
    (directory / "checkpoints").joinpath(own.name.replace("branch--", "other--")).rename(
        directory / "checkpoints" / "other--step=99-last"
    )
    losses, said = runs.start(resumable, options=options)
    assert len(losses[0]) == 1
    assert "other--step=99-last was saved under another name and is not used" in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"trainer.max_steps": -1}, "max_steps is -1; expected 1 or more"),
        ({"trainer.val_check_interval": 0}, "trainer.val_check_interval is 0; expected 1 step"),
        ({"optim.config.lr": -1.0}, "optim.config.lr is -1.0; expected 0 or more"),
        ({"trainer.gradient_clip_val": 1.0}, "trainer.gradient_clip_val is 1.0, which NeMo does"),
        ({"trainer.limit_train_batches": 1}, "trainer.limit_train_batches is 1, which NeMo does"),
        ({"data.rampup_batch_size": [8, 8, 64]}, "data.rampup_batch_size is [8, 8, 64], which"),
    ],
)
def test_nonsense_on_the_command_line_is_refused(
    runs: Runs, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    errors, _ = runs.start(tmp_path, overrides=overrides)
    assert len(set(errors)) == 1
    assert errors[0].startswith(f"UpcyclingError: {message}")


NAMES = ["group/run 1", "größe[1]*?-step=9-last"]


@pytest.mark.parametrize("name", thorough_but(NAMES, NAMES[0]))
def test_a_run_of_any_name_resumes(runs: Runs, tmp_path: Path, name: str) -> None:
    for step in (1, 2):
        losses, said = runs.start(tmp_path, 1, {"name": name, "max_steps": step})
        assert len(losses[0]) == 1
        assert ("not upcycling again" in said) == (step == 2)
    logs = {path.parent for path in (tmp_path / "tb_logs").rglob("events*")}
    assert logs == {tmp_path / "tb_logs" / name}
    assert len(list((tmp_path / name / "checkpoints").glob("*-last"))) == 1


def test_a_run_is_started_once_at_a_time(runs: Runs, ranks: RankPool, tmp_path: Path) -> None:
    """A kill of the first lets the second go on, though what the first has forked still lives."""
    hangs = tmp_path / "hangs"
    how: dict[str, Any] = {
        "directory": runs.workspace,
        "options": {"name": "twice", "max_steps": STEPS, **EP2},
        "overrides": OVERRIDES | {"log.ckpt.every_n_train_steps": 1},
    }
    accident = "Hang", {"step": STOPPED + 1, "says": str(hangs)}
    first = runs.nursery.start(train, 2, **how, accident=accident)
    while not hangs.exists():
        assert first.runs(0), first.said(0)[-3000:]
    at_once = how["overrides"] | {"resume.seconds_to_wait": 0.0}
    errors = ranks.run(train, 2, **(how | {"overrides": at_once}))
    assert len(set(errors)) == 1
    assert "Another start of this run is at work in" in errors[0]
    assert f"process {first.pids[0]}, since" in errors[0]
    for pid in first.pids:
        os.kill(pid, signal.SIGKILL)
    while set(first.pids) & {process.pid for process in first.left_over()}:
        time.sleep(0.1)
    assert first.left_over(), "nothing outlives the first"
    results = ranks.run(train, 2, **how)
    first.kill()
    assert [len(losses) for losses, _ in results] == [STEPS - STOPPED] * 2

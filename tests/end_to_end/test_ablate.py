"""`nemo-upcycle ablate`: real trainings, killed and gone on with; and the loss that it measures."""

import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_upcycle.ablations import inputs, studies
from nemo_upcycle.ablations.bases import BATCH, TINY, Base
from nemo_upcycle.ablations.inputs import Inputs
from nemo_upcycle.ablations.results import OVER_TIME, Workspace, jobs_of
from nemo_upcycle.ablations.runner import Question, ablate
from nemo_upcycle.ablations.workers import train_all
from nemo_upcycle.data.choices import write_choices
from nemo_upcycle.initializers.statistics import read_manifest
from nemo_upcycle.nemo.router_warm_up import RouterWarmUp
from tests import progress
from tests.end_to_end import cli
from tests.workspace import make_workspace

ARMS, SEEDS, STEPS = ("e8t2", "lr_between", "lr_minimum"), (1, 2), 3
ABLATE = (
    "nemo-upcycle",
    "ablate",
    "--study",
    "learning_rate",
    "--seeds",
    str(len(SEEDS)),
    "--steps",
    str(STEPS),
    "--workers",
    "2",
    "--out",
    "ablations",
)


def results(directory: Path) -> dict[str, bytes]:
    """Return the results that are kept, by name."""
    found = sorted((directory / "ablations" / "results").glob("*.json"))
    return {path.stem: path.read_bytes() for path in found}


def kill_after_a_result(directory: Path) -> None:
    """Start the command and kill it, not what it started, when it has kept something."""
    process = cli.start_until(directory, lambda: results(directory), *ABLATE)
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    pids = [each.pid for each in started]
    assert progress.until(lambda: not psutil.wait_procs(started, timeout=0)[1], pids)


def held_out_loss(workspace: Path, dense: Path, shares: dict[str, float]) -> float:
    """Return what transformers' dense model loses on the last 3% of some corpora."""
    model = AutoModelForCausalLM.from_pretrained(dense).eval()
    total = 0.0
    for name, weight in shares.items():
        corpus = IndexedDataset(str(workspace / "data" / name))
        documents = [corpus[n] for n in range(len(corpus.sequence_lengths))]
        tokens = np.concatenate(documents[round(0.97 * len(documents)) :]).astype(np.int64)
        rows = [tokens[at : at + 257] for at in range(0, len(tokens) - 256, 256)][:100]
        with torch.no_grad():
            found = [model(torch.tensor(row[None, :-1])).logits[0] for row in rows]
        losses = [
            torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]))
            for logits, row in zip(found, rows, strict=True)
        ]
        total += weight * float(sum(losses)) / len(losses)
    return total


@pytest.mark.slow
def test_the_recipes_are_the_factorys_with_what_the_arms_say(tmp_path: Path) -> None:
    from nemo_upcycle.ablations.training import recipe_of

    workspace = Workspace(make_workspace(tmp_path / "demo"))
    names = ("e8t2", "cf1", "lr_minimum", "centroids", "drop_warmup", "dense", "scratch")
    file = tmp_path / "statistics"
    arms = [studies.ARMS[name] for name in names]
    jobs = [Inputs(file).given_to(job) for job in jobs_of(arms, 2, STEPS, workspace, tmp_path)]
    made = {job.name: recipe_of(job, tmp_path / "scratch") for job in jobs}
    for job in jobs:
        recipe = made[job.name]
        assert recipe.trainer.max_steps == job.steps == STEPS
        assert (recipe.data.seed, recipe.data.num_train_samples) == (job.seed, job.samples)
        assert recipe.data.global_batch_size == BATCH["global_batch_size"]
        upcycles = [c for c in recipe.trainer.callbacks if hasattr(c, "dense_checkpoint")]
        assert len(upcycles) == (job.arm.start != "scratch")
        if job.arm.start == "upcycled":
            assert upcycles[0].seed == job.seed
    assert made["cf1-1"].model.config.moe_expert_capacity_factor == 1.0
    assert made["lr_minimum-1"].optim.config.lr == made["e8t2-1"].optim.config.min_lr
    assert made["lr_minimum-1"].optim.lr_scheduler.warmup_steps == 0
    assert made["e8t2-1"].optim.lr_scheduler.warmup_steps > 0
    (upcycles,) = [c for c in made["centroids-1"].trainer.callbacks if hasattr(c, "seed")]
    assert upcycles.router_initializer == f"centroids(stats='{file}')"
    warm_ups = {
        name: [c.steps for c in recipe.trainer.callbacks if c.__fn_or_cls__ is RouterWarmUp]
        for name, recipe in made.items()
    }
    assert {name for name, steps in warm_ups.items() if steps} == {"drop_warmup-1", "drop_warmup-2"}
    assert made["dense-1"].model.config.num_moe_experts is None
    assert made["scratch-2"].model.config.num_moe_experts == 8


@pytest.mark.slow
def test_killed_ablations_go_on(tmp_path: Path) -> None:
    make_workspace(tmp_path / "demo")
    kill_after_a_result(tmp_path)
    kept = results(tmp_path)
    assert 0 < len(kept) < len(ARMS) * len(SEEDS)

    output = cli.run(tmp_path, *ABLATE)
    found = results(tmp_path)
    assert set(found) == {f"{arm}-{seed}" for arm in ARMS for seed in SEEDS}, output
    assert found.items() >= kept.items()  # not done again
    assert "Resetting the learning rate ends lower than going on at the minimum: " in output
    left = {path.name for path in (tmp_path / "ablations").iterdir()}
    assert left == {".lock", "results", "ablations.json", "ablations.md", "ablations.png"}
    _check_numbers(tmp_path, {name: json.loads(text)["result"] for name, text in found.items()})

    # A training that is done again comes to the same; the others stay as they are.
    (tmp_path / "ablations" / "results" / "lr_between-2.json").unlink()
    cli.run(tmp_path, *ABLATE)
    again = results(tmp_path)
    assert _without_time(again.pop("lr_between-2")) == _without_time(found.pop("lr_between-2"))
    assert again == found


def _check_numbers(directory: Path, found: dict[str, dict[str, Any]]) -> None:
    # The MoE begins as the dense model, whose loss transformers computes too.
    demo = directory / "demo"
    expected = held_out_loss(demo, demo / "dense_hf", {"documentation": 0.7, "sources": 0.3})
    for result in found.values():
        assert result["start"] == pytest.approx(expected, abs=1e-5)
        assert result["over_time"]["loss"][::2] == [result["start"], result["end"]]
        confidence, apart = (result["over_time"][n] for n in OVER_TIME[::4])
        assert len(confidence) == 3 and all(1 / 8 < each <= 1 for each in confidence)
        assert apart[0] < 1e-6 < apart[1] < apart[2]
    # Everything else makes a difference: the learning rate, and the seed.
    assert len({result["end"] for result in found.values()}) == len(found)
    written = json.loads((directory / "ablations" / "ablations.json").read_text())
    assert {(one["arm"], one["seed"]): one["end"] for one in written["trainings"]} == {
        (name[:-2], int(name[-1])): result["end"] for name, result in found.items()
    }


def _without_time(text: bytes) -> dict[str, Any]:
    found = json.loads(text)
    for name in ("seconds", "step_seconds", "other_seconds"):
        del found["result"][name]
    return found


REAL = (
    *("nemo-upcycle", "ablate", "seq_length=64", "global_batch_size=4", "micro_batch_size=2"),
    *("precision=32", "--recipe", "smollm2_135m_e8t2", "--accelerator", "cpu"),
    *("--dense", "demo/dense_hf", "--data", "0.7 demo/data/documentation 0.3 demo/data/sources"),
    *("--items", "demo/task/next_line.jsonl", "--seeds", "2", "--workers", "2"),
    *("--out", "ablations"),
)


def next_line_accuracy(workspace: Path) -> float:
    """Return the share of questions that transformers' dense model answers right."""
    model = AutoModelForCausalLM.from_pretrained(workspace / "dense_hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(workspace / "dense_hf")
    lines = (workspace / "task" / "next_line.jsonl").read_text().splitlines()
    right = 0
    for item in map(json.loads, lines):
        before = len(tokenizer(item["context"], add_special_tokens=False)["input_ids"])
        scores = []
        for choice in item["choices"]:
            ids = tokenizer(item["context"] + choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                known = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(known[at - 1, ids[at]]) for at in range(before, len(ids))))
        right += scores.index(max(scores)) == item["label"]
    return right / len(lines)


@pytest.mark.slow
def test_a_recipe_is_compared_within_its_minutes_and_goes_on(tmp_path: Path) -> None:
    """The minutes are far more than two steps need; what is chosen depends on the machine."""
    workspace = make_workspace(tmp_path / "demo")
    corpora = [workspace / "data" / f"{name}.jsonl" for name in ("documentation", "sources")]
    write_choices(corpora, workspace / "task", items=12)

    # With a number of steps; killed, then gone on with.
    steps = (*REAL, "--steps", "2")
    process = cli.start_until(tmp_path, lambda: results(tmp_path), *steps)
    process.kill()
    process.wait()
    kept = results(tmp_path)
    output = cli.run(tmp_path, *steps)
    found = results(tmp_path)
    assert found.items() >= kept.items()
    arms = ("e8t2", "dense", "dense_flops", "drop", "g4", "scratch")
    assert set(found) == {f"{arm}-{seed}" for arm in arms for seed in (1, 2)}, output
    before = next_line_accuracy(workspace)
    for name, text in found.items():
        result = json.loads(text)["result"]
        if name.startswith(("e8t2", "dense", "g4")):
            assert result["start_accuracy"] == pytest.approx(before)
        assert 0 <= result["end_accuracy"] <= 1
    table = (tmp_path / "ablations" / "ablations.md").read_text()
    assert table.count("| next_line |") == 1
    assert "smollm2_135m, upcycled and trained on for 2 steps" in table
    assert (tmp_path / "ablations" / "ablations.png").read_bytes()[:4] == b"\x89PNG"

    # With minutes: trials, a plan that is kept, and what is left out.
    limited = (*REAL[:-1], "limited", "--minutes", "30", "--min-steps", "1")
    shutil.copytree(tmp_path / "ablations" / "results", tmp_path / "limited" / "results")
    _keep_plan_of_two_steps(tmp_path, limited)
    report = (tmp_path / "limited" / "ablations.md").read_text()
    assert "**Left out:** steps beyond 2 of the recipe's" in report
    again = {path.stem: path.read_bytes() for path in (tmp_path / "limited/results").glob("*.json")}
    assert again == found  # the plan has the steps of the results that are there


class Spawned(Base):
    """The tiny model, with processes that start as on a GPU."""

    start_method = "spawn"


@pytest.mark.slow
def test_a_process_that_starts_as_on_a_gpu_comes_to_the_same(tmp_path: Path) -> None:
    workspace = Workspace(make_workspace(tmp_path / "demo"))
    arm = studies.ARMS["dense"]
    ends = []
    for name, base in (("forked", TINY), ("spawned", Spawned(**vars(TINY)))):
        jobs = jobs_of([replace(arm, base=base)], 1, STEPS, workspace, tmp_path / name)
        late = [replace(jobs[0], seed=2)]  # would end after the deadline, and is not started
        deadline, logs = time.time() + 1e6, tmp_path / f"{name}-logs"
        done = train_all([*late, *jobs], 1, logs, deadline, lambda job: 1e9 * (job.seed == 2))
        assert [job.seed for job in done] == [1]
        result = jobs[0].result()
        assert result is not None
        assert late[0].result() is None
        ends.append((result.start, result.end))
    assert ends[0] == pytest.approx(ends[1])


def _keep_plan_of_two_steps(directory: Path, command: tuple[str, ...]) -> None:
    """Run the trials alone, then the command with a plan of two steps, as a slow machine's."""
    plan = directory / "limited" / "plan.json"
    process = cli.start_until(directory, plan.is_file, *command)
    process.kill()
    process.wait()
    kept = json.loads(plan.read_text())
    kept["plan"]["steps"], kept["plan"]["seeds"] = 2, 2
    kept["plan"]["arms"] = ["e8t2", "dense", "dense_flops", "drop", "g4", "scratch"]
    kept["plan"]["left_out"] = ["steps beyond 2 of the recipe's 763"]
    plan.write_text(json.dumps(kept))
    cli.run(directory, *command)


@pytest.mark.slow
def test_arms_read_statistics_of_the_training_text(tmp_path: Path) -> None:
    """Made once; a further arm finds them."""
    workspace = Workspace(make_workspace(tmp_path / "demo"))
    study = studies.STUDIES["data_aware"].of(("e8t2", "cluster_svd"))
    out = tmp_path / "ablations"
    report = ablate(Question([study], 1, 2), workspace, out, 2, lambda *said: None)
    written = (out / "statistics").stat().st_mtime_ns
    manifest = read_manifest(out / "statistics")
    assert [text["name"] for text in manifest["texts"]] == ["documentation.bin", "sources.bin"]
    copies, fitted = report.studies[0].rows
    assert fitted.start.mean > copies.start.mean + 0.001
    assert fitted.over_time["expert_distance"][0].mean > 0.01
    more = studies.STUDIES["data_aware"].of(("e8t2", "cluster_svd", "partial"))
    ablate(Question([more], 1, 2), workspace, out, 2, lambda *said: None)
    assert (out / "statistics").stat().st_mtime_ns == written


@pytest.mark.slow
def test_arms_mix_branches_that_were_trained_on_a_corpus_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "BRANCH_STEPS", 4)
    demo = make_workspace(tmp_path / "demo")
    study = studies.STUDIES["data_aware"].of(("e8t2", "prompts", "mixed", "mixed_ridge"))
    out = tmp_path / "ablations"
    report = ablate(Question([study], 1, 2), Workspace(demo), out, 2, lambda *said: None)

    # What is kept of a branch is what was trained, in transformers too; on its own corpus alone.
    for corpus in ("documentation", "sources"):
        kept = json.loads((out / "branches" / f"{corpus}-1.json").read_text())["result"]
        loss = held_out_loss(demo, out / "branches" / corpus, {corpus: 1.0})
        assert loss == pytest.approx(kept["end"], abs=1e-5)
        assert loss < kept["start"]
        assert AutoTokenizer.from_pretrained(out / "branches" / corpus).vocab_size > 0

    copies, prompts, mixed, ridge = report.studies[0].rows
    assert prompts.start.mean == pytest.approx(copies.start.mean, abs=1e-5)
    confident = [row.over_time["router_confidence"][0].mean for row in (copies, prompts)]
    assert confident[1] != pytest.approx(confident[0], abs=1e-3)
    assert len({round(row.start.mean, 5) for row in (copies, mixed, ridge)}) == 3
    assert mixed.over_time["expert_distance"][0].mean > 0
    manifest = read_manifest(out / "branches" / "statistics")
    assert (manifest["branches"], manifest["second_moment"]) == (2, "full")

    # The same command finds everything.
    before = {file: file.stat().st_mtime_ns for file in (out / "branches").rglob("*")}
    ablate(Question([study], 1, 2), Workspace(demo), out, 2, lambda *said: None)
    assert {file: file.stat().st_mtime_ns for file in (out / "branches").rglob("*")} == before


@pytest.mark.slow
def test_a_training_that_fails_is_one_error(tmp_path: Path) -> None:
    """The text is cut short, which only a training's own process sees."""
    workspace = make_workspace(tmp_path / "demo")
    index = workspace / "data" / "sources.idx"
    index.write_bytes(index.read_bytes()[:20])
    output = cli.run(tmp_path, *ABLATE)
    error = output.splitlines()[-1]
    assert re.match(r"Error: The training \w+-1 has failed: \w+: .* All it said is in ", error)
    assert "Traceback" not in output
    log = tmp_path / error.rpartition(" ")[2].rstrip(".")
    assert "Traceback" in log.read_text()
    assert not results(tmp_path)
    assert not list((tmp_path / "ablations").glob(".training-*"))

"""What may change between a run's starts, and what may not."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from nemo_upcycle.engine.load_record import LOADS, LoadRecord, Loads, read_loads
from nemo_upcycle.report.page import write_report
from tests.distributed.runs import STEPS, STOPPED, Runs
from tests.distributed.training import EP2, FOLDED
from tests.thorough import thorough_but

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


@pytest.mark.parametrize("mapping", thorough_but(MAPPINGS, "TP2 PP2 EP2", "1 rank"))
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
    losses, said = runs.start(resumable, overrides={"data.micro_batch_size": 1})
    assert "[resume] data.micro_batch_size 2 → 1" in said
    assert losses[0] == pytest.approx(expected[STOPPED:], rel=1e-4)


def test_a_run_gets_more_steps(runs: Runs, resumable: Path) -> None:
    losses, _ = runs.start(resumable, options=EP2 | {"max_steps": STEPS + 1})
    assert len(losses[0]) == STEPS + 1 - STOPPED


@pytest.mark.thorough
def test_a_run_goes_on_whose_state_is_gathered_on_the_host(
    runs: Runs, resumable: Path, expected: list[float]
) -> None:
    """As recipes save that keep less of the optimizer on the GPUs."""
    strategy = "trainer.strategy.distrib_optim_fully_reshardable_mem_efficient"
    losses, _ = runs.start(resumable, overrides={strategy: True})
    assert losses[0] == pytest.approx(expected[STOPPED:], rel=1e-5)
    more, _ = runs.start(
        resumable, options=EP2 | {"max_steps": STEPS + 1}, overrides={strategy: True}
    )
    assert len(more[0]) == 1


@pytest.mark.thorough
def test_the_record_of_loads_goes_on(runs: Runs, resumable: Path) -> None:
    """Without the steps that a killed run has measured after its last checkpoint."""
    path = resumable / "run" / LOADS
    (first,) = read_loads(path)
    record = LoadRecord(path)
    for step in (3, 4):
        record.add(Loads(step, first.layers))
    with path.open("a") as file:
        file.write('{"step":5,')
    runs.start(resumable, overrides={"trainer.callbacks.-2.every_n_steps": 1})
    found = read_loads(path)
    assert [loads.step for loads in found] == [1, 3, 4]
    assert found[0] == first
    assert all(loads.layers != first.layers for loads in found[1:])


def test_the_page_knows_of_the_beginning(runs: Runs, resumable: Path) -> None:
    """What the first start has reported is in the last start's checkpoint; the mapping is new."""
    runs.start(resumable, world_size=1, options={})
    page = write_report(resumable / "run").path.read_text()
    assert "Step 0: exact" in page
    assert "The run reported this when it began." in page
    assert "EP1: 1 rank, 1 per node" in page


def test_another_global_batch_size_is_refused(runs: Runs, resumable: Path) -> None:
    """NeMo itself would train for ever."""
    errors, _ = runs.start(resumable, overrides={"data.global_batch_size": 4})
    assert len(set(errors)) == 1
    assert "16 samples in 2 steps; now global_batch_size=4" in errors[0]


def test_accumulation_by_lightning_is_refused(runs: Runs, resumable: Path) -> None:
    """NeMo would validate for ever."""
    errors, _ = runs.start(resumable, overrides={"trainer.accumulate_grad_batches": 2})
    assert len(set(errors)) == 1
    assert "trainer.accumulate_grad_batches is 2, which NeMo does not honor" in errors[0]


def test_data_that_end_before_the_steps_end_the_run(runs: Runs, resumable: Path) -> None:
    """Whatever made them so short: Lightning would look for more for ever."""
    errors, _ = runs.start(resumable, accident=("ShortData", {"samples": 24}))
    assert len(set(errors)) == 1
    assert "The data end after step 3 of trainer.max_steps=4" in errors[0]


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


@pytest.mark.thorough
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


@pytest.mark.thorough
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


def test_a_checkpoint_of_the_run_that_is_cut_off_is_an_error(runs: Runs, resumable: Path) -> None:
    """The file is named, and what to do; not the ranks that have failed."""
    (file,) = resumable.glob("run/checkpoints/*/weights/__0_0.distcp")
    size = file.stat().st_size
    os.truncate(file, size // 2)
    errors, _ = runs.start(resumable)
    for error in errors:
        assert f"{file} has {size // 2} bytes of the {size} that .metadata says" in error
        assert "remove it to go on from an older checkpoint of the run" in error
        assert len(error.splitlines()) == 1


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

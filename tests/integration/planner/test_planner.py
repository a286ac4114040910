"""The planner against what was published, and against itself."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from nemo_upcycle_recipes.expectations import expected, mapping, workload
from nemo_upcycle_recipes.numbers import LLAMA3_8B_DENSE, LLAMA3_8B_E8T2, LLAMA_TINY_E8T2, RECIPES
from typer.testing import CliRunner

from benchmarks import planner as benchmark
from benchmarks.published import RUNS, Published
from nemo_upcycle.checkpoint.described import dense_of_config
from nemo_upcycle.cli import app
from nemo_upcycle.config import RECOMPUTE, ParallelFolding
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.planner.efficiency import CALIBRATED
from nemo_upcycle.planner.hardware import Hardware, device_peak_tflops, hardware, shipped
from nemo_upcycle.planner.memory import memory
from nemo_upcycle.planner.scaling import scaling
from nemo_upcycle.planner.search import mappings_of, predict, search
from nemo_upcycle.planner.step_time import step_time
from nemo_upcycle.planner.tuning import COMPONENTS, tune
from nemo_upcycle.planner.workload import Mapping
from nemo_upcycle.plans.job import plan_job

H100 = hardware("h100")
PAPER = workload(LLAMA3_8B_E8T2)
TINY = workload(LLAMA_TINY_E8T2)
ONE_GPU_NODES = replace(H100, name="alone", gpus_per_node=1, nvlink_domain=1)


# --- Published runs ------------------------------------------------------------------------------

FOUND = {run: benchmark.candidates(run) for run in RUNS}
MEASURED = {run: found for run, found in FOUND.items() if run.mfu is not None}


def error(run: Published, efficiency: Any) -> float:
    return benchmark.predicted_mfu(FOUND[run], efficiency) / run.mfu - 1


@pytest.mark.parametrize("run", MEASURED, ids=lambda run: run.label)
def test_published_speeds(run: Published) -> None:
    assert abs(error(run, CALIBRATED)) < 0.08


@pytest.mark.parametrize("run", FOUND, ids=lambda run: run.label)
def test_what_did_not_fit_does_not_and_what_ran_does(run: Published) -> None:
    assert bool(FOUND[run]) == (run.mfu is not None)


def test_committed_efficiencies_are_the_fitted() -> None:
    fitted = benchmark.fit(list(MEASURED.items()))
    for name in benchmark.PRIOR:
        assert getattr(fitted, name) == pytest.approx(getattr(CALIBRATED, name), rel=5e-3), name


@pytest.mark.parametrize("group", benchmark.GROUPS)
def test_runs_of_a_model_are_predicted_from_others(group: str) -> None:
    """No run of the model is fitted to; 10% is the aim, which FSDP, not offered, may miss."""
    belongs = benchmark.GROUPS[group]
    others = benchmark.fit([row for row in MEASURED.items() if not belongs(row[0])])
    for run in filter(belongs, MEASURED):
        assert abs(error(run, others)) < (0.15 if "FSDP" in run.label else 0.10), run.label


@pytest.mark.parametrize("model", ["Mixtral 8x22B", "Llama3-8x70B"])
def test_order_of_the_methods(model: str) -> None:
    """Folding above Megatron-Core without, above FSDP with EP, and FSDP far below."""
    runs = {run.label.split(", ")[1]: run for run in MEASURED if run.label.startswith(model)}
    values = {
        name: benchmark.predicted_mfu(FOUND[run], CALIBRATED)
        for name, run in runs.items()
    }  # fmt: skip
    order = ["folding", "Megatron-Core", "TP + EP + DP", "FSDP + EP", "FSDP"]
    present = [name for name in order if name in values]
    assert [values[name] for name in present] == sorted(values.values(), reverse=True)
    assert values["FSDP + EP"] < 0.6 * values["folding"]
    assert "FSDP" not in values or values["FSDP"] < 0.15 * values["folding"]


def test_the_papers_capacity_factors_keep_their_order() -> None:
    """CF 1 on TP1 is a fifth faster than the others, which are alike."""
    table = [run for run in MEASURED if run.source == "2412.09952"]
    first, *others = [benchmark.predicted_mfu(FOUND[run], CALIBRATED) for run in table]
    assert 1.15 < first / max(others) < 1.3
    assert max(others) / min(others) < 1.02


# --- Memory --------------------------------------------------------------------------------------


def paper_mapping(**changes: Any) -> Mapping:
    return replace(mapping(LLAMA3_8B_E8T2), **changes)


def test_more_recompute_keeps_less_and_takes_longer() -> None:
    mappings = [paper_mapping(recompute=name) for name in RECOMPUTE]
    kept = [memory(PAPER, each).activations for each in mappings]
    times = [step_time(PAPER, each, H100).total for each in mappings]
    assert kept == sorted(kept, reverse=True)
    assert times == sorted(times)
    assert len(set(kept)) == len(set(times)) == len(RECOMPUTE)


def test_full_recompute_keeps_a_layers_input() -> None:
    """What is kept can be counted by hand: PP1, one microbatch, bf16."""
    folding = ParallelFolding.of(tp=2, cp=2, ep=8)
    used = memory(PAPER, Mapping(folding, 128, recompute="full"))
    assert used.activations == 32 * 2 * 4096 * 8192 / (2 * 2)


def test_sharded_optimizer_shrinks_with_data_parallelism_and_the_rest_does_not() -> None:
    one, many = (memory(PAPER, paper_mapping(world_size=size)) for size in (128, 512))
    assert one.parameters == pytest.approx(many.parameters, rel=1e-4)
    assert one.gradients == 2 * one.parameters
    assert one.optimizer == pytest.approx(4 * many.optimizer, rel=1e-3)


def test_parameters_are_those_of_the_plan() -> None:
    dense = dense_of_config(LLAMA3_8B_E8T2.config, "", "")
    job = plan_job(dense, PAPER.upcycling, LLAMA3_8B_E8T2.folding, 64, 8)
    planned = max(owner.bytes_to_write for owner in job.owners)
    assert memory(PAPER, paper_mapping()).parameters == pytest.approx(planned, rel=1e-4)


# --- Time ----------------------------------------------------------------------------------------


def test_collectives_cost_what_they_cross() -> None:
    """Inside a node they are faster than across; a rack that NVLink joins is a node."""
    node, alone = (step_time(PAPER, paper_mapping(), on) for on in (H100, ONE_GPU_NODES))
    assert node.tensor_parallel < 0.2 * alone.tensor_parallel
    assert node.expert_parallel < 0.2 * alone.expert_parallel
    assert node.matrices == alone.matrices
    wide = paper_mapping(folding=replace(LLAMA3_8B_E8T2.folding, expert_tensor_parallel_size=8))
    racks = replace(H100, nvlink_domain=72)
    rack, node = (step_time(PAPER, wide, on) for on in (racks, H100))
    assert rack.expert_parallel < node.expert_parallel


def test_bubble_shrinks_with_virtual_stages_and_microbatches() -> None:
    def pipeline(vpp: int | None, world_size: int = 128) -> float:
        folding = ParallelFolding.of(tp=2, cp=2, pp=4, vpp=vpp, ep=8)
        time = step_time(PAPER, Mapping(folding, world_size), H100)
        return time.pipeline / time.total

    assert pipeline(None) > pipeline(2) > pipeline(8)
    assert pipeline(8, 512) > pipeline(8, 128)


def test_model_flops_do_not_change_with_the_mapping() -> None:
    """MFU times time times GPUs is the same work, whatever is computed again."""
    work = {
        round(one.mfu * one.time.total * one.mapping.world_size, 6)
        for one in (
            predict(PAPER, paper_mapping(recompute=name, world_size=size), H100)
            for name in RECOMPUTE
            for size in (128, 512)
        )
    }
    assert len(work) == 1


# --- Search --------------------------------------------------------------------------------------


def test_the_search_finds_the_fastest_that_fits() -> None:
    """Against all mappings, each with every recompute, one by one."""
    every = [
        predict(PAPER, one, H100)
        for mappings in mappings_of(PAPER, 16, H100)
        for one in mappings
    ]  # fmt: skip
    fitting = [one for one in every if one.fits]
    found = search(PAPER, 16, H100)
    assert 0 < len(fitting) < len(every)
    assert all(one.fits for one in found)
    assert found[0].time.total == min(one.time.total for one in fitting)
    times = [one.time.total for one in found]
    assert times == sorted(times)


def test_every_mapping_is_one_that_megatron_takes() -> None:
    seen = 0
    for mappings in mappings_of(workload(LLAMA3_8B_DENSE), 64, H100):
        for one in mappings:
            seen += 1
            folding, microbatches = one.folding, one.microbatches(512)
            assert one.world_size == 64
            assert folding.expert_model_parallel_size == 1
            assert microbatches * one.data_parallel * one.micro_batch_size == 512
            if folding.virtual_pipeline_model_parallel_size:
                assert microbatches % folding.pipeline_model_parallel_size == 0
    assert seen > 50


def test_nothing_fits_says_what_is_needed() -> None:
    with pytest.raises(UpcyclingError, match=r"on 8 GPUs: .* needs the least memory, \d+ GiB"):
        tune(PAPER, 8, H100)
    with pytest.raises(UpcyclingError, match="No mapping of the model"):
        tune(PAPER, 7 * 11, H100)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UpcyclingError, match="global batch of 512 does not divide"):
        predict(PAPER, Mapping(ParallelFolding(), 24), H100)


def test_scaling_loads_what_the_plan_says() -> None:
    dense = dense_of_config(LLAMA3_8B_E8T2.config, "", "")
    small, large = scaling(PAPER, dense, H100, (4, 8, 64))
    assert (small.gpus, large.gpus) == (8, 64)
    assert small.best is None
    assert small.least is not None
    assert not small.least.fits
    assert large.best is not None
    assert large.loading is not None
    job = plan_job(dense, PAPER.upcycling, large.best.mapping.folding, 8, 8)
    assert large.loading.bytes_of_node == max(job.bytes_of_nodes)
    assert large.loading.bytes_of_job == sum(job.bytes_of_nodes)


# --- Hardware ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped())
def test_shipped_hardware(name: str) -> None:
    kind = hardware(name)
    assert device_peak_tflops(f"NVIDIA {kind.name} 80GB") == kind.peak_tflops
    assert tune(TINY, kind.gpus_per_node, kind).best


def test_unknown_devices_have_no_peak() -> None:
    assert device_peak_tflops("Tesla T4") is None


BAD: list[tuple[str, str]] = [
    ("base: h100\nmemory_gib: -3", "memory_gib is -3.0; expected more than 0"),
    ("name: mine", "missing mandatory value: peak_tflops"),
    ("base: h100\nspeed: 3", "Key 'speed' not in 'Hardware'"),
    ("base: h100\nmemory_gib: lots", "could not be converted to Float"),
    ("base: nosuch", "base is 'nosuch'; expected one of: a100"),
    ("- 1", "Expected the fields name, peak_tflops"),
    ("a: [1", "Expected the fields name, peak_tflops"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_hardware_is_one_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UpcyclingError, match=message) as raised:
        hardware(str(tmp_path / "mine.yaml"))
    assert "mine.yaml" in str(raised.value)


# --- The command ---------------------------------------------------------------------------------


def run(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["tune", *words])


def test_the_command_shows_times_memory_and_why(tmp_path: Path) -> None:
    (tmp_path / "slow.yaml").write_text("base: h100\nname: slow network\nnetwork_bandwidth: 5\n")
    result = run("--gpus", "64", "--hardware", str(tmp_path / "slow.yaml"))
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 80 for line in result.output.splitlines())
    for words in (*list(COMPONENTS.values())[:3], "optimizer, this rank's part", "Why the first"):
        assert words in result.output
    assert "nothing was fitted to slow network" in " ".join(result.output.split())
    assert 'nemo llm pretrain --factory "llama3_8b_e8t2(num_nodes=8' in result.output
    assert "…" not in result.output


def test_what_is_said_is_kept() -> None:
    result = run(
        "--gpus", "64", "--json", "--top", "3", "tensor_model_parallel_size=4", "recompute=full",
        "data.global_batch_size=256", "moe_expert_capacity_factor=1.0",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert len(found["best"]) == 3
    for one in found["best"]:
        assert one["folding"]["tensor_model_parallel_size"] == 4
        assert (one["recompute"], one["world_size"], one["fits"]) == ("full", 64, True)
        assert one["step_time"] == pytest.approx(sum(one["time"].values()))
        assert one["total_memory"] == pytest.approx(sum(one["memory"].values()))
        assert one["tokens_per_second"] == pytest.approx(256 * 8192 / one["step_time"])
    assert found["compared"]["unfolded"]["folding"]["expert_tensor_parallel_size"] == 4


def test_a_microbatch_that_is_said_is_kept_under_context_parallelism() -> None:
    """Otherwise it is left out: half of both makes the same pieces."""
    words = ["--gpus", "64", "--json", "--top", "1", "context_parallel_size=2"]
    free, said = (run(*words, *more) for more in ([], ["data.micro_batch_size=4"]))
    assert json.loads(free.stdout)["best"][0]["micro_batch_size"] != 4
    assert json.loads(said.stdout)["best"][0]["micro_batch_size"] == 4


def test_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_upcycle.planner.scaling.GPUS", (8, 16, 32))
    picture = tmp_path / "new" / "scaling.png"
    result = run("--gpus", "16", "--recipe", "llama32_3b_e8t2", "--scaling", str(picture))
    assert result.exit_code == 0, result.output
    assert picture.stat().st_size > 50_000
    rows = [line.split()[0] for line in result.output.splitlines() if line.split()]
    assert [row for row in rows if row.isdecimal()][-3:] == ["8", "16", "32"]


CLEAR: list[tuple[list[str], str]] = [
    (["--hardware", "nope"], "There is no hardware 'nope'; expected one of: a100"),
    (["--gpus", "8"], "Nothing fits into 94%"),
    (["--recipe", "nope"], "There is no recipe 'nope'"),
    (["recompute=some"], "recompute is 'some'; expected one of: none, moe_act, moe, full"),
    (["global_batch_size=0"], "global_batch_size is 0; expected 1 or more"),
    (["--recipe", "llama3_8b_dense", "recompute=moe"], "has no experts"),
    (["account_for_loss_in_pipeline_split=true"], "tune supports only even pipeline stages"),
]


@pytest.mark.parametrize(("words", "message"), CLEAR)
def test_errors_are_one_line(words: list[str], message: str) -> None:
    result = run(*words)
    assert result.exit_code == 1
    (line,) = result.output.strip().splitlines()
    assert message in line


# --- Recipes -------------------------------------------------------------------------------------

FULL_SIZE = [recipe for recipe in RECIPES.values() if "tiny" not in recipe.name]


@pytest.mark.parametrize("recipe", FULL_SIZE, ids=lambda recipe: recipe.name)
def test_recipes_fit_and_are_near_the_best(recipe: Any) -> None:
    """As they are, for the uneven first steps; and with the least recompute, near the fastest."""
    assert expected(recipe, H100).fits
    best = search(workload(recipe), recipe.world_size, H100)[0]
    names = RECOMPUTE if recipe.upcycling.num_moe_experts else ("none", "full")
    steady = [expected(replace(recipe, recompute=name), H100) for name in names]
    fastest = min((one for one in steady if one.fits), key=lambda one: one.time.total)
    # The paper's own mapping is what it is; its control's too.
    stated = recipe.name in ("llama3_8b_e8t2", "llama3_8b_dense")
    assert fastest.time.total < (1.45 if stated else 1.1) * best.time.total


def test_hardware_is_not_forgotten() -> None:
    """A memory twice as large lets mappings in that did not fit."""
    twice: Hardware = replace(H100, memory_gib=2 * H100.memory_gib)
    assert len(search(PAPER, 16, twice)) > len(search(PAPER, 16, H100))

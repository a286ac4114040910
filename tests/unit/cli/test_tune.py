"""`nemo-upcycle tune`: what it shows, keeps and refuses."""

import json
import shlex
from pathlib import Path

import pytest
from click.testing import Result
from nemo_upcycle_recipes.numbers import LLAMA3_8B_E8T2
from typer.testing import CliRunner

from nemo_upcycle.cli import app
from nemo_upcycle.planner.tuning import COMPONENTS
from tests.tiny import CONFIG, FAMILIES


def run(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["tune", *words])


def test_the_command_shows_times_memory_and_why(tmp_path: Path) -> None:
    (tmp_path / "slow.yaml").write_text("base: h100\nname: slow network\nnetwork_bandwidth: 5\n")
    result = run("--gpus", "16", "--hardware", str(tmp_path / "slow.yaml"))
    assert result.exit_code == 0, result.output
    *shown, command = result.output.strip().splitlines()
    assert all(len(line) <= 80 for line in shown)
    assert command.startswith('nemo llm pretrain --factory "llama3_8b_e8t2(num_nodes=2')
    for words in (*list(COMPONENTS.values())[:3], "optimizer, this rank's part", "Why the first"):
        assert words in result.output
    assert "Nothing was fitted to slow network" in " ".join(result.output.split())
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
    words = ["--gpus", "16", "--json", "--top", "1", "context_parallel_size=2"]
    free, said = (run(*words, *more) for more in ([], ["data.micro_batch_size=4"]))
    assert json.loads(free.stdout)["best"][0]["micro_batch_size"] != 4
    assert json.loads(said.stdout)["best"][0]["micro_batch_size"] == 4


@pytest.mark.parametrize(
    "setting",
    ["context_parallel_size=16", "tensor_model_parallel_size=8", "micro_batch_size=8",
     "pipeline_model_parallel_size=2", "account_for_loss_in_pipeline_split=True",
     "expert_model_parallel_size=8", "virtual_pipeline_model_parallel_size=None"],
)  # fmt: skip
def test_what_is_said_is_searched_whatever_its_value(setting: str) -> None:
    """Also where the planner by itself would not try the value."""
    (line,) = run("--gpus", "64", setting).stdout.splitlines()[-1:]
    assert setting in line
    assert "num_nodes=8, num_gpus_per_node=8" in line


def test_uneven_stages_that_are_said_are_searched() -> None:
    words = ("pipeline_model_parallel_size=4", "num_layers_in_first_pipeline_stage=5")
    found = run("--gpus", "64", "--json", *words, "num_layers_in_last_pipeline_stage=7")
    folding = json.loads(found.stdout)["best"][0]["folding"]
    assert folding["num_layers_in_first_pipeline_stage"] == 5
    assert folding["pipeline_model_parallel_size"] == 4


@pytest.mark.parametrize(
    ("said", "nodes"), [(["num_nodes=16"], (16, 4)), (["num_gpus_per_node=2"], (32, 2))]
)
def test_nodes_that_are_said_are_kept(said: list[str], nodes: tuple[int, int]) -> None:
    line = run("--gpus", "64", *said).stdout.splitlines()[-1]
    assert f"num_nodes={nodes[0]}," in line
    assert f"num_gpus_per_node={nodes[1]}," in line


def test_measured_hardware(tmp_path: Path) -> None:
    """Measured and assumed figures are told apart, and the printed command plans with the same."""
    file, model = tmp_path / "hardware.yaml", tmp_path / "a model"
    file.write_text("base: h200\nnvlink_bandwidth: 300\nmeasured: nvlink_bandwidth\n")
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG | {"model_type": "llama"}))
    result = run("--measured", str(file), "--dense", str(model), "--gpus", "8")
    shown = " ".join(result.output.split())
    assert "Measured by `nemo-upcycle check`" in shown
    assert "nvlink_bandwidth 300 GB/s. Of the data sheet of H200: peak_tflops," in shown
    line = result.output.splitlines()[-1]
    assert f"upcycle(dense_checkpoint='{model}', " in line
    assert f", hardware='{file}')" in line
    both = run("--measured", str(file), "--hardware", "h100")
    assert "are given; give one of them" in both.output


@pytest.mark.parametrize("name", ["a $HOME", "a 'b'", 'a "b"', "a`b`", "a!b", "a\\b"])
def test_a_shell_reads_the_path_of_the_printed_command(tmp_path: Path, name: str) -> None:
    model = tmp_path / name
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG | {"model_type": "llama"}))
    line = run("--dense", str(model), "--gpus", "2").output.splitlines()[-1]
    factory = shlex.split(line)[-1]
    quote = '"' if "'" in name else "'"
    assert factory.startswith(f"upcycle(dense_checkpoint={quote}{model}{quote}, ")


def test_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_upcycle.planner.scaling.GPUS", (8, 16, 32))
    picture = tmp_path / "new" / "scaling.png"
    result = run("--gpus", "8", "--recipe", "llama_tiny_e8t2", "--scaling", str(picture))
    assert result.exit_code == 0, result.output
    assert picture.stat().st_size > 50_000
    rows = [line.split()[0] for line in result.output.splitlines() if line.split()]
    assert [row for row in rows if row.isdecimal()][-3:] == ["8", "16", "32"]


CLEAR: list[tuple[list[str], str]] = [
    (["--hardware", "nope"], "There is no hardware 'nope'; expected one of: a100"),
    (["--gpus", "8", "optimizer_offload_fraction=0"], "Nothing fits into 94%"),
    (["optimizer_state=int8"], "optimizer_state is 'int8'; expected one of: fp32, bf16, fp8"),
    (["precision=32", "optimizer_state=bf16"], "this is supported only with bf16-mixed"),
    (["--recipe", "nope"], "There is no recipe 'nope'"),
    (
        ["recompute=some"],
        "recompute is 'some'; expected one of: none, moe_act, norm_act, moe, full",
    ),
    (["global_batch_size=0"], "global_batch_size is 0; expected 1 or more"),
    (["--recipe", "llama3_8b_dense", "recompute=moe"], "has no experts"),
    (["--gpus", "80"], "Possible: global_batch_size=480 or 560; or 68 or 88 GPUs."),
    (["--gpus", "40"], "Possible: global_batch_size=480 or 560; or 32 or 44 GPUs."),
    (["--gpus", "10"], "with more memory per GPU: global_batch_size=480 or 560; or 8 or 12 GPUs."),
    (["--gpus", "13"], "13 GPUs do not spread evenly over nodes of 8 GPUs, with at least half of"),
    (["--gpus", "13"], "Use 12 (2 nodes of 6) or 16 (2 nodes of 8)."),
    (["--gpus", "64", "num_gpus_per_node=6"], "num_gpus_per_node=6 does not make 64; expected 60"),
    (["--gpus", "64", "num_gpus_per_node=16"], "but a node of H100 has 8 GPUs; use 1 to 8"),
    (["--gpus", "64", "num_nodes=128"], "num_nodes=128 does not make 64; expected 128 GPUs"),
    (
        ["--gpus", "64", "tensor_model_parallel_size=3"],
        "num_attention_heads=32 does not divide by tensor_model_parallel_size=3; choose a "
        "divisor of 32. Possible: tensor_model_parallel_size=1, 2, 4 or 8.",
    ),
    (["--gpus", "64", "context_parallel_size=6"], "Possible: context_parallel_size=1, 2, 4 or 8."),
    (
        ["--gpus", "64", "expert_model_parallel_size=3"],
        "8 experts do not divide over expert_model_parallel_size=3; choose a divisor of 8. "
        "Possible: expert_model_parallel_size=1, 2, 4 or 8.",
    ),
    (
        ["--gpus", "64", "virtual_pipeline_model_parallel_size=7"],
        "do not divide over virtual_pipeline_model_parallel_size=7; choose a divisor of 16, or "
        "other stages. Possible: virtual_pipeline_model_parallel_size=None, 2, 4, 8",
    ),
    (
        ["--gpus", "72", "pipeline_model_parallel_size=9"],
        "32 layers do not divide over the pipelin",
    ),
    (["--gpus", "64", "micro_batch_size=3"], "Possible: micro_batch_size=1, 2 or 4; or global_ba"),
    (
        ["--gpus", "64", "seq_length=8190", "context_parallel_size=4"],
        "seq_length=8190 does not div",
    ),
]


@pytest.mark.parametrize(("words", "message"), CLEAR)
def test_errors_are_one_line(words: list[str], message: str) -> None:
    result = run(*words)
    assert result.exit_code == 1
    (line,) = result.output.strip().splitlines()
    assert message in line


def test_tune_takes_a_dense_checkpoint(dense: Path) -> None:
    command = ["tune", "--recipe", "llama_tiny_e8t2", "--gpus", "2", "precision=bf16-mixed"]
    runner = CliRunner(env={"COLUMNS": "200"})
    own, other = (runner.invoke(app, [*command, *words]) for words in ((), ("--dense", str(dense))))
    assert (own.exit_code, other.exit_code) == (0, 0), other.output
    assert f"dense_checkpoint='{dense}'" in " ".join(other.stdout.split())
    assert "dense_checkpoint" not in own.stdout


def test_tune_names_its_word_for_a_dense_checkpoint_too() -> None:
    result = CliRunner().invoke(app, ["tune", "dense_checkpoint=/a"])
    assert result.stderr.startswith("Error: 'dense_checkpoint=/a' is an argument of the factory")


# --- Any dense model, without a recipe ----------------------------------------------------------


def trained_with(*words: str) -> dict[str, str]:
    """Return the arguments of the factory in the printed command."""
    result = CliRunner(env={"COLUMNS": "2000"}).invoke(app, ["tune", *words])
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stdout.splitlines() if "--factory" in line]
    name, _, arguments = line.split('"')[1].rstrip(")").partition("(")
    assert name == "upcycle"
    return dict(part.split("=", 1) for part in arguments.split(", "))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "nemotron"])
def test_every_family_is_tuned_without_a_recipe(tmp_path: Path, family: str) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(CONFIG | {"model_type": family} | FAMILIES[family])
    )
    found = trained_with("--dense", str(tmp_path), "--gpus", "2")
    assert found["dense_checkpoint"] == f"'{tmp_path}'"
    assert (found["num_nodes"], found["num_gpus_per_node"]) == ("1", "2")


def test_the_printed_command_repeats_what_was_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "llama"}))
    file = str(tmp_path / "config.json")
    words = ("--gpus", "4", "--experts", "4", "expert_model_parallel_size=2", "seq_length=32")
    found = trained_with("--dense", file, *words)
    assert found["dense_checkpoint"] == f"'{tmp_path}'"
    assert (found["num_moe_experts"], found["expert_model_parallel_size"]) == ("4", "2")
    assert found["seq_length"] == "32"
    control = trained_with("--dense", file, "--gpus", "4", "num_moe_experts=None")
    assert control["num_moe_experts"] == "None"
    assert "expert_model_parallel_size" not in control


@pytest.mark.parametrize(("gpus", "nodes"), [(4, (1, 4)), (12, (2, 6)), (20, (4, 5)), (64, (8, 8))])
def test_the_printed_command_trains_on_exactly_these_gpus(
    tmp_path: Path, gpus: int, nodes: tuple[int, int]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "llama"}))
    found = trained_with("--dense", str(tmp_path), "--gpus", str(gpus))
    assert (int(found["num_nodes"]), int(found["num_gpus_per_node"])) == nodes


def test_what_would_fit_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA3_8B_E8T2.config))
    result = run("--dense", str(tmp_path), "--gpus", "8", "optimizer_offload_fraction=0")
    assert (
        "GiB too much. This would fit: optimizer_offload_fraction=1.0 on the same GPUs; or "
        "num_moe_experts=4 on the same GPUs; or 16 GPUs."
    ) in result.output
    assert run("--dense", str(tmp_path), "--gpus", "8", "--experts", "4").exit_code == 0
    words = ("--dense", str(tmp_path), "--gpus", "16", "pipeline_model_parallel_size=1")
    fixed = run(*words, "expert_model_parallel_size=1", "expert_tensor_parallel_size=1")
    assert "the same GPUs, with mapping and recompute left to the planner" in fixed.output


def test_one_node_gets_a_command_with_the_optimizer_on_the_host(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA3_8B_E8T2.config))
    found = trained_with("--dense", str(tmp_path), "--gpus", "8")
    assert (found["num_nodes"], found["num_gpus_per_node"]) == ("1", "8")
    assert float(found["optimizer_offload_fraction"]) >= 0.75
    assert "optimizer_state" not in found
    given = ("--gpus", "8", "optimizer_offload_fraction=0.8")
    kept = trained_with("--dense", str(tmp_path), *given)
    assert kept["optimizer_offload_fraction"] == "0.8"


@pytest.mark.parametrize("gpus", ["96", "24", "12"])
def test_a_batch_that_divides_only_unevenly_is_named(gpus: str) -> None:
    result = run("--gpus", gpus)
    assert result.exit_code == 0, result.output
    assert "PP3+L" in result.output
    assert "global_batch_size=480 or 576 has more mappings" in " ".join(result.output.split())
    assert f"num_nodes={-(-int(gpus) // 8)}," in result.output
    assert "account_for_loss_in_pipeline_split=True" in result.output
    other = run("--gpus", gpus, "global_batch_size=480").output
    assert "has more mappings" not in " ".join(other.split())


def test_stages_that_are_given_are_not_blamed_on_the_batch() -> None:
    words = ["pipeline_model_parallel_size=3", "account_for_loss_in_pipeline_split=true"]
    result = run("--gpus", "96", *words)
    assert "PP3+L" in result.output
    assert "has more mappings" not in " ".join(result.output.split())

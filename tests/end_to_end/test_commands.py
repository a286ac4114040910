"""The commands that a user meets first."""

import re
import shlex
from pathlib import Path

import pytest

from tests.end_to_end import cli


def test_light_commands_import_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from nemo_upcycle.cli import app; "
        "result = CliRunner().invoke(app, ['--help']); print(result.output); "
        "print('HEAVY', sorted({'torch', 'nemo', 'nemo_run', 'megatron', 'lightning', "
        "'transformers'} & set(sys.modules)))"
    )
    output = cli.run(tmp_path, "python", "-c", script)
    assert "HEAVY []" in output
    assert "data" in output


def test_nemo_upcycle_has_the_same_commands(tmp_path: Path) -> None:
    light = cli.run(tmp_path, "nemo-upcycle", "--help", forked=False)
    heavy = cli.run(tmp_path, "nemo", "upcycle", "--help")
    assert "Couldn't load entrypoint" not in heavy

    def commands(text: str) -> list[str]:
        lines = text.split("Commands", 1)[1].splitlines()[1:]
        return [line.strip("│ ").split()[0] for line in lines if line.strip("│╰─╯ ")]

    assert commands(light) == commands(heavy)
    assert {"data", "compare", "plan", "version"} <= set(commands(light))


@pytest.mark.parametrize("words", [["--help"], ["num_nodes=16", "--rank", "5"]])
def test_plan_is_the_same_under_nemo(tmp_path: Path, words: list[str]) -> None:
    light = cli.run(tmp_path, "nemo-upcycle", "plan", *words, forked=False)
    heavy = cli.run(tmp_path, "nemo", "upcycle", "plan", *words)
    # NeMo may warn before it, and `--help` begins with the command's own name.
    lines = [line for line in light.splitlines() if "Usage:" not in line and line.strip()]
    assert len(lines) > 10
    assert [line for line in heavy.splitlines() if line in lines][-len(lines) :] == lines


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    words = ("nemo-upcycle", "data", "tokenizer", "nope.jsonl", "--out", "x")
    output = cli.run(tmp_path, *words, forked=False)
    lines = [line for line in output.splitlines() if line.strip()]
    assert lines[0].startswith("Error: ")
    assert "Traceback" not in output
    assert not (tmp_path / "x").exists()


def test_nemo_llm_help_lists_pretrain(tmp_path: Path) -> None:
    output = cli.run(tmp_path, "nemo", "llm", "--help")
    assert "Couldn't load entrypoint" not in output
    assert "pretrain" in output


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (
            "llama3_8b_e8t2",
            [
                # What arXiv 2412.09952 states.
                *("num_moe_experts=8", "moe_router_topk=2", "moe_router_pre_softmax=False"),
                *("moe_expert_capacity_factor=4.0", "num_nodes=64", "devices=8"),
                *("max_steps=23842", "lr=3e-05", "min_lr=3e-07", "warmup_steps=100"),
                *("tensor_model_parallel_size=2", "pipeline_model_parallel_size=4"),
                *("virtual_pipeline_model_parallel_size=8", "expert_model_parallel_size=8"),
                *("expert_tensor_parallel_size=1", "use_distributed_optimizer=True"),
                *("precision='bf16-mixed'", "recompute_modules=['moe']", "moe_grouped_gemm=True"),
                *("MFUCallback", "MoEHealthCallback", "PreemptionCallback"),
            ],
        ),
        *(
            (name, [f"num_layers={layers}", "num_moe_experts=8", f"num_nodes={nodes}"])
            for name, layers, nodes in [
                ("llama32_1b_e8t2", 16, 1),
                ("llama32_3b_e8t2", 28, 2),
                ("mistral_7b_e8t2", 32, 16),
                ("qwen25_7b_e8t2", 28, 16),
                ("llama31_70b_e8t2", 80, 64),
            ]
        ),
        (
            "llama3_8b_e8t2(performance_mode=True, wandb_project='moe', recompute='none')",
            ["MegatronCommOverlapCallback", "GarbageCollectionCallback", "WandbLogger"],
        ),
        (
            "llama3_8b_e8t2(num_nodes=16, moe_expert_capacity_factor=None)",
            ["num_nodes=16", "moe_expert_capacity_factor=None"],
        ),
        (
            "llama_tiny_e8t2(granularity=4, moe_router_topk=8, "
            "initializer='hybrid(copy; noise(std=0.01; fraction=0.5))', moe_layer_freq=[0]+[1]*3, "
            "moe_z_loss_coeff=0.001, moe_shared_expert=True, weight_scaling='paper')",
            [
                "CpuMegatronStrategy",
                "num_moe_experts=32",
                "moe_router_topk=8",
                "moe_ffn_hidden_size=64",
                "hybrid(copy; noise(std=0.01; fraction=0.5))",
                "moe_z_loss_coeff=0.001",
                "moe_shared_expert_intermediate_size=256",
                "UpcyclingWarning: step 0 is not exact",
            ],
        ),
    ],
)
def test_dryrun_prints_the_recipe(tmp_path: Path, factory: str, words: list[str]) -> None:
    overrides = ["trainer.log_every_n_steps=7", "data.micro_batch_size=3"]
    output = cli.run(
        tmp_path, "nemo", "llm", "pretrain", "--factory", factory, "--dryrun", *overrides
    )
    for word in [*words, "log_every_n_steps=7", "micro_batch_size=3"]:
        assert word in output


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["seq_length=4096"], ["seq_length=4096", "num_nodes=8"]),
        (
            ["granularity=2", "moe_router_topk=4", "moe_layer_freq=skip_first=2;skip_last=1"],
            ["num_moe_experts=16", "moe_router_topk=4", "moe_ffn_hidden_size=7168"],
        ),
        (
            ["expansion_rate=4", "moe_expert_capacity_factor=none", "initializer=drop(ratio=0.3)"],
            ["num_moe_experts=4", "moe_expert_capacity_factor=None", "drop(ratio=0.3)"],
        ),
        (["--recipe", "llama3_8b_dense"], ["LlamaModel", "num_nodes=8"]),
    ],
)
def test_what_tune_says_can_be_run(tmp_path: Path, settings: list[str], words: list[str]) -> None:
    said = cli.run(tmp_path, "nemo-upcycle", "tune", "--gpus", "64", *settings)
    command = " ".join(said.split("Train with the first mapping:")[1].split())
    output = cli.run(tmp_path, *shlex.split(command), "--dryrun")
    sizes = re.findall(r"(\w+_parallel_size)=(\w+)", command)
    assert len(sizes) >= 4
    for word in [*(f"{name}={size}" for name, size in sizes), *words]:
        assert word in output


def test_bad_recipe_argument_is_refused_before_anything_starts(tmp_path: Path) -> None:
    factory = "llama_tiny_e8t2(num_moe_experts=6,expert_model_parallel_size=4)"
    words = ("nemo", "llm", "pretrain", "--factory", factory, "--yes")
    output = cli.run(tmp_path, *words, forked=True)
    assert "Error: 6 experts do not divide over expert_model_parallel_size=4" in output
    assert "Launching" not in output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["model.config.nonsense=3"],
            "Error: model.config.nonsense=3: No parameter named 'nonsense'",
        ),
        (["optim.config.lr=abc"], "Error: Failed to parse 'abc' as typing.Optional[float]. --dry"),
        (
            ["dense_checkpoint=a,b"],
            "Error: Positional argument found after keyword argument: 'b'. A factory's arguments "
            "are KEY=VALUE, cut at commas; several values of one are separated by semicolons: "
            "dense_checkpoint='DIR1; DIR2'.",
        ),
        # Found while NeMo-Run builds the configuration, which Fiddle then describes.
        (["--yes"], "Error: No dense checkpoint at 'demo/dense_hf'"),
    ],
    ids=["no such name", "no such value", "a comma", "while it is built"],
)
def test_nemo_run_says_a_mistake_in_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    recipe = [] if "--yes" in words else ["--dryrun"]
    factory = "llama_tiny_e8t2"
    if "," in words[0]:
        factory, words = f"{factory}({words[0]})", []
    command = ["--factory", factory, *words, *recipe]
    output = cli.run(tmp_path, "nemo", "llm", "pretrain", *command, forked=True)
    assert said in output
    after = output.split(said)[1].strip()
    assert "\n" not in after and "Fiddle" not in output and "Unexpected" not in output

"""`nemo-upcycle plan`: what it says is what the ranks would do."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from nemo_upcycle_recipes.numbers import RECIPES
from typer.testing import CliRunner

from nemo_upcycle.checkpoint import DTYPE_BYTES
from nemo_upcycle.cli import app
from nemo_upcycle.families.llama import LLAMA
from nemo_upcycle.plans.rank import BUFFERS, CHUNK_BYTES
from tests.tiny import CONFIG, into_hub_cache, write_dense, write_llama

PAPER = RECIPES["llama3_8b_e8t2"]
CONFIG_8B = PAPER.config
BYTES_8B = 2 * 8_030_261_248
"""Llama 3 8B in bf16."""


def plan(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["plan", *words])


def plan_json(*words: str) -> dict[str, Any]:
    result = plan(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def write_headers(directory: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> Path:
    """Write a checkpoint of the 8B whose file is all header and hole."""
    (directory / "config.json").write_text(json.dumps(CONFIG_8B))
    header, end = {}, 0
    for name, shape in shapes.items():
        count = DTYPE_BYTES[dtype]
        for extent in shape:
            count *= extent
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + count]}
        end += count
    encoded = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    return directory


def stage_rows(result: Result) -> list[list[str]]:
    """Return the words of the table's rows, which begin with a pipeline stage."""
    lines = result.stdout.splitlines()
    return [line.split() for line in lines if line.startswith((" 0 ", " 1–2 ", " 3 "))]


# --- The whole job ------------------------------------------------------------------------------


def test_the_papers_run_fits_a_screen() -> None:
    result = plan()
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 80
    for words in (
        "E8T2, 47.49B parameters, 13.67B",
        "512 ranks = 64 nodes × 8",
        "TP2 · CP2 · DP32 · PP4 · VPP8",
        "ETP1 · EP8 · EDP16 · PP4 · VPP8",
        "exact: experts are the dense layer",
        "the recipe's own config, no",
        "16 of each expert",
    ):
        assert words in result.stdout
    assert [row[:5] for row in stage_rows(result)] == [
        ["0", "128", "0", "8", "1"],
        ["1–2", "256", "128", "8", "1"],
        ["3", "128", "384", "8", "1"],
    ]


def test_sizes_of_the_papers_run() -> None:
    found = plan_json()
    job, owners = found["job"], found["owners"]
    assert found["dense"]["bytes"] == BYTES_8B
    assert (job["world_size"], job["expert_data_parallel_size"]) == (512, 16)
    assert (job["parameters"], job["active_parameters"]) == (47_491_321_856, 13_668_454_400)
    assert sorted(rank for owner in owners for rank in owner["ranks"]) == list(range(512))
    for name in ("bytes_to_read", "bytes_to_write"):
        assert job[name] == sum(len(owner["ranks"]) * owner[name] for owner in owners)
    assert job["bytes_read_once"] == BYTES_8B  # no two blocks overlap but equal ones
    assert len(job["bytes_of_nodes"]) == 64
    # The eight ranks of a node have one stage, both TP ranks and all experts: its dense layers.
    layers = 8 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336 + 2 * 4096)
    assert job["bytes_of_nodes"][0] == 2 * (128256 * 4096 + layers)
    assert job["bytes_of_nodes"][20] == 2 * layers
    # Attention is on CP·DP = 64 groups of ranks, each of 8 experts on 16, norms on all 128.
    assert job["copies"]["model.layers.3.self_attn.k_proj.weight"] == 64
    assert job["copies"]["model.layers.3.mlp.up_proj.weight"] == 8 * 16
    assert job["copies"]["model.norm.weight"] == 128


G2_PAPER = ("granularity=2", "moe_router_topk=4", "weight_scaling=paper")


@pytest.mark.parametrize(
    ("families", "settings", "exact", "words"),
    [
        (("llama",), (), True, "their weights sum to 1"),
        (("llama", "llama"), (), False, "experts come from 2 dense models"),
        (("llama",), G2_PAPER, False, "changes what a gated neuron computes"),
        (("nemotron",), G2_PAPER, True, "whole copies of the dense layer"),
    ],
    ids=["one", "two", "SwiGLU", "squared ReLU"],
)
def test_json_and_table_say_the_same_of_step_0(
    tmp_path: Path, families: tuple[str, ...], settings: tuple[str, ...], exact: bool, words: str
) -> None:
    parts = [write_dense(tmp_path / str(n), family, seed=n) for n, family in enumerate(families)]
    command = ("--recipe", "llama_tiny_e8t2", "--dense", ";".join(map(str, parts)), *settings)
    found = plan_json(*command)["step_0"]
    assert found["exact"] is exact
    assert words in found["reason"]
    table = " ".join(plan(*command).stdout.split())
    assert f"step 0 {'exact' if exact else 'not exact'}: {found['reason']}" in table


def test_a_plan_takes_every_name_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    dense = write_llama(tmp_path / "dense")
    snapshot = into_hub_cache(dense, tmp_path / "hub", "some-org/some-model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
    sizes = [
        plan_json("--recipe", "llama_tiny_e8t2", "--dense", name)["dense"]["bytes"]
        for name in (str(dense), "~/dense", "some-org/some-model")
    ]
    assert len(set(sizes)) == 1
    (snapshot / "model.safetensors").unlink()
    for name in snapshot.iterdir():
        if name.name != "config.json":
            name.unlink()
    found = plan_json("--recipe", "llama_tiny_e8t2", "--dense", "some-org/some-model")["dense"]
    assert "config.json alone" in found["note"]


def test_memory_besides_the_model() -> None:
    """Full buffers, and a converted chunk where the dtypes differ and the chunk is reused."""
    buffers = BUFFERS * CHUNK_BYTES
    assert plan_json()["owners"][0]["peak_bytes"] == buffers
    assert plan_json("precision=32")["owners"][0]["peak_bytes"] == buffers
    reused = plan_json("precision=32", "expert_model_parallel_size=4")["owners"][0]
    assert reused["peak_bytes"] == buffers + 2 * CHUNK_BYTES


def test_ranks_that_differ_have_rows_of_their_own() -> None:
    result = plan(
        "virtual_pipeline_model_parallel_size=None",
        "num_layers_in_first_pipeline_stage=5",
        "num_layers_in_last_pipeline_stage=3",
    )
    assert [row[:4] for row in stage_rows(result)] == [
        ["0", "128", "0", "5"],
        ["1–2", "256", "128", "12"],
        ["3", "128", "384", "3"],
    ]


# --- One rank -----------------------------------------------------------------------------------


def rows_filled(rank: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield every row of every shard that is filled, as often as it is."""
    targets = [target for copy in rank["copies"] for target in copy["targets"]] + rank["zeros"]
    for target in targets:
        for row in range(*target["rows"]):
            yield target["shard"], row


def test_a_ranks_plan_is_complete() -> None:
    tiny = ("--recipe", "llama_tiny_e8t2", "--world-size", "4", "tensor_model_parallel_size=2")
    found = plan_json(*tiny, "pipeline_model_parallel_size=2", "--rank", "3")["rank"]
    assert found["coordinates"] == {"tp": 1, "cp": 0, "dp": 0, "pp": 1, "etp": 0, "ep": 0, "edp": 1}
    assert (found["layers"], found["experts"]) == ([2, 3], list(range(8)))
    routers = {router["shard"] for router in found["routers"]}
    expected = [
        (index, row)
        for index, shard in enumerate(found["shards"])
        if index not in routers
        for row in range(shard["shape"][0])
    ]
    assert sorted(rows_filled(found)) == expected
    assert [router["layer"] for router in found["routers"]] == [2, 3]
    assert found["bytes_to_read"] == sum(copy["bytes"] for copy in found["copies"])


def test_a_rank_is_shown_by_name() -> None:
    result = plan("--rank", "77")
    assert result.exit_code == 0
    for words in (
        "77 of 512, on node 9; 16 ranks with the same shards",
        "tp 1 · cp 0 · dp 19 · pp 0; etp 0 · ep 5 · edp 9",
        "0, 4 … 28",
        "embed_tokens[64128:128256]",
        "self_attn.o_proj[:, 2048:4096]",
        "mlp.experts.E.linear_fc1[14336:28672]",
        "random values",
    ):
        assert words in result.stdout
    queries = next(line for line in result.stdout.splitlines() if "q_proj" in line)
    assert queries.split() == [
        "self_attn.q_proj[2048:4096]",
        "self_attention.linear_qkv[3072:5888",
        "×4]",
    ]


def test_padding_is_shown_as_zeros(tmp_path: Path) -> None:
    config = {**CONFIG, "model_type": "llama", "vocab_size": 255}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tiny = ("--recipe", "llama_tiny_e8t2", "--world-size", "2", "--dense", str(tmp_path))
    result = plan(*tiny, "tensor_model_parallel_size=2", "--rank", "1")
    assert "zeros" in result.stdout
    assert "output_layer[255:256]" in result.stdout


# --- The recipe's arguments ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tensor_parallel=4"], "'tensor_parallel=4' is not an argument of llama3_8b_e8t2"),
        (["num_nodes"], "'num_nodes' is not an argument"),
        (
            ["dense_checkpoint=/a"],
            "'dense_checkpoint=/a' is an argument of the factory; expected --dense /a",
        ),
        (["seed=-1"], "seed is -1; expected an integer"),
        (["granularity=-1"], "granularity is -1; expected 1 or more"),
        (["initializer=drop(ratio=nan)"], "drop: ratio is nan"),
        (["router_init_std=inf"], "router_init_std is inf; expected float"),
        (["num_nodes=two"], "num_nodes is two; expected int."),
        (["num_nodes=2.5"], "num_nodes is 2.5; expected int."),
        (["num_nodes=True"], "num_nodes is True; expected int."),
        (["moe_expert_capacity_factor=x"], "expected float or None"),
        (["num_nodes=0"], "expected 1 or more"),
        (["precision=fp4"], "precision is 'fp4'"),
        (["num_nodes=3"], "24 ranks do not divide by TP·CP·PP = 16"),
        (["tensor_model_parallel_size=16"], "num_query_groups=8 does not divide"),
        (["num_moe_experts=4"], "4 experts do not divide"),
        (["granularity=3"], "ffn_hidden_size=14336 does not divide by granularity=3"),
        (["initializer=dorp"], "There is no initializer 'dorp'"),
        (["moe_layer_freq=[1]*3"], "has 3 layers"),
        (["--world-size", "0"], "The world size is 0"),
        (["--rank", "512"], "There is no rank 512; expected 0 to 511."),
        (["--rank", "512", "--json"], "There is no rank 512; expected 0 to 511."),
        (["--recipe", "mixtral"], "There is no recipe 'mixtral'; expected one of: llama3_8b_e8t2"),
        (["--recipe", "llama_tiny", "num_moe_experts=4"], "is not an argument of llama_tiny"),
        (["--dense", "/nowhere"], "No dense checkpoint at '/nowhere'"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str) -> None:
    result = plan(*words)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert message in line


# --- The dense checkpoint -----------------------------------------------------------------------


def test_headers_are_read_and_checked(tmp_path: Path) -> None:
    shapes = LLAMA.shapes(PAPER.architecture)
    paper = ("--recipe", "llama3_8b_e8t2")
    found = plan_json(*paper, "--dense", str(write_headers(tmp_path, shapes, "F32")))
    assert found["dense"]["note"] == "headers read and checked"
    assert found["dense"]["bytes"] == 2 * BYTES_8B
    assert found["owners"][0]["bytes_to_read"] == 2 * plan_json()["owners"][0]["bytes_to_read"]
    del shapes["model.norm.weight"]
    result = plan(*paper, "--dense", str(write_headers(tmp_path, shapes, "BF16")))
    assert result.exit_code == 1
    assert "1 missing: model.norm.weight" in result.stderr


def test_config_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_8B | {"num_hidden_layers": 64}))
    found = plan_json("--recipe", "llama3_8b_e8t2", "--dense", str(tmp_path))
    assert found["dense"]["note"] == "config.json alone, without weights"
    assert found["owners"][0]["layers"] == [8 * chunk + i for chunk in range(8) for i in (0, 1)]


def test_nothing_heavy_is_imported() -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from nemo_upcycle.cli import app; "
        "result = CliRunner().invoke(app, ['plan', '--rank', '3']); assert not result.exit_code; "
        "print(sorted({'torch', 'nemo', 'nemo_run', 'megatron', 'lightning', 'transformers', "
        "'numpy', 'huggingface_hub'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert output.stdout.strip() == "[]", output


# --- Any dense model, without a recipe ----------------------------------------------------------


def test_the_planner_chooses_the_mapping_of_any_dense_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_8B))
    found = plan_json("--dense", str(tmp_path), "--experts", "4", "--world-size", "8")
    assert (found["recipe"], found["upcycling"]["num_moe_experts"]) == ("upcycle", 4)
    by_file = plan_json(
        "--dense", str(tmp_path / "config.json"), "num_moe_experts=4", "num_nodes=1"
    )
    assert by_file["folding"] == found["folding"]
    assert "config.json alone" in by_file["dense"]["note"]


def test_without_a_number_the_fewest_nodes_that_fit_are_planned(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_8B))
    for words, ranks in (((), 16), (("--experts", "4"), 8), (("num_moe_experts=None",), 8)):
        found = plan_json("--dense", str(tmp_path), *words)["job"]
        assert found["num_nodes"] * found["num_gpus_per_node"] == ranks, words


def test_what_is_said_of_any_model_is_kept_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_8B))
    words = ("--world-size", "32", "pipeline_model_parallel_size=4", "--granularity", "2")
    found = plan_json("--dense", str(tmp_path), *words, "--topk", "4", "--layers", "2")
    assert found["folding"]["pipeline_model_parallel_size"] == 4
    upcycling = found["upcycling"]
    assert (upcycling["num_moe_experts"], upcycling["moe_router_topk"]) == (16, 4)

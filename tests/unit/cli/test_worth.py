"""`nemo-upcycle worth`: what it prints inside and outside of the scaling law's range."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from nemo_upcycle_recipes.numbers import LLAMA3_8B_E8T2
from typer.testing import CliRunner

from nemo_upcycle.cli import app
from nemo_upcycle.cli.worth import count
from tests.tiny import CONFIG, FAMILIES, LLAMA_400M

SMALL_WORDS = ("--dense-tokens", "74B", "--tokens", "20B", "--gpus", "8")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("models") / "my-400m"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA_400M))
    return str(directory)


@pytest.fixture(scope="module")
def llama3_8b(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("models") / "Meta-Llama-3-8B"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA3_8B_E8T2.config))
    return str(directory)


def run(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["worth", *words])


def said(result: Result) -> str:
    return " ".join(result.output.split())


def found(*words: str) -> dict[str, Any]:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_small_model_gets_costs_losses_and_a_verdict(small: str, tmp_path: Path) -> None:
    picture = tmp_path / "worth.png"
    result = run("--dense", small, *SMALL_WORDS, "--price", "2.5", "--out", str(picture))
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 80 for line in result.stdout.splitlines()[:-1])
    words = said(result)
    assert words.startswith("my-400m, 403M parameters without embeddings, 74.0B tokens seen → E8T2")
    for part in (
        "upcycle 20.0B", "dense on, same tokens 20.0B", "dense on, same GPU-hours", "cost",
        "MoE from scratch, same loss 14.6B–50.7B", "2.24–2.32", "Sunk and not counted: the dense",
        "the tokens where the MoE from scratch catches up: 59.", "the printed digits allow 8.0",
        "to none up to 368B", "undecided", "not fitted again",
    ):  # fmt: skip
        assert part in words, part
    assert "?" not in words
    assert "…" not in words
    assert "xtrapolate" not in words
    assert picture.stat().st_size > 50_000


def test_the_json_has_the_same(small: str) -> None:
    one = found("--dense", small, *SMALL_WORDS, "--price", "2.5")
    moe = one["moe"]
    assert (moe["world_size"], moe["fits"]) == (8, True)
    rate = 8 / moe["tokens_per_second"] / 3600
    assert moe["gpu_hours_per_token"] == pytest.approx(rate)
    upcycle = one["ways"]["upcycle"]
    assert upcycle["gpu_hours"]["value"] == pytest.approx(20e9 * rate)
    assert upcycle["cost"]["value"] == pytest.approx(2.5 * 20e9 * rate)
    assert (one["outside"], one["extrapolated"]) == ([], False)
    assert one["break_even"]["high"] is None  # infinite
    assert one["break_even"]["low"] < one["break_even"]["value"]
    assert one["advantages"]["scratch"] is None
    assert upcycle["loss"]["low"] < upcycle["loss"]["value"] < upcycle["loss"]["high"]
    without = found("--dense", small, *SMALL_WORDS)
    assert without["ways"]["upcycle"]["cost"] is None
    assert without["price"] is None


BIG_WORDS = ("--dense-tokens", "15T", "--tokens", "100B", "--gpus", "16")


def test_llama_3_8b_gets_costs_a_refusal_and_what_others_measured(llama3_8b: str) -> None:
    result = run("--dense", llama3_8b, *BIG_WORDS)
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    words = said(result)
    for part in (
        "upcycle 100B", "dense on, same tokens 100B", "Sunk and not counted: the dense "
        "pre-training, 15.0T tokens", "No loss is predicted",
        "N1, the dense parameters without embeddings and output layer, is 6.98B; the law was "
        "fitted from about 15.0M to 1.00B", "D1, the dense model's tokens, is 15.0T; the law was "
        "fitted up to 368B", "--extrapolate", "arXiv 2412.09952", "arXiv 2410.07524",
        "arXiv 2409.02060", "arXiv 2212.05055", "MoE from scratch, same loss ? ? ?",
        "The MoE from scratch costs as much per token as upcycling",
    ):  # fmt: skip
        assert part in words, part
    assert "D2" not in words
    assert "Break-even" not in words
    assert "cost " not in words.partition("Sunk")[0]


def test_an_extrapolation_is_marked_and_contradicted(llama3_8b: str) -> None:
    words = said(run("--dense", llama3_8b, *BIG_WORDS, "--extrapolate"))
    assert "Extrapolated: these losses are outside of the law's range" in words
    assert "Measured: OLMo-1B, 2T tokens" in words
    assert "after 500B tokens" in words
    assert "catches up never (rounding allows" in words
    assert "Break-even" in words
    assert words.count("2409.02060") == 1


def test_a_picture_needs_a_loss_and_the_costs_are_printed_all_the_same(
    small: str, tmp_path: Path
) -> None:
    picture = tmp_path / "worth.svg"
    words = ("--dense", small, *SMALL_WORDS, "--experts", "4", "--out", str(picture))
    result = run(*words)
    assert result.exit_code == 1
    assert "upcycle" in result.stdout
    assert result.stderr.startswith(f"Error: {picture} was not drawn: no loss is predicted")
    assert not picture.exists()
    assert run(*words, "--extrapolate").exit_code == 0
    assert picture.stat().st_size > 50_000


def test_other_experts_are_named(small: str) -> None:
    one = found("--dense", small, *SMALL_WORDS, "--experts", "4", "--layers", "2")
    assert [text.partition(";")[0] for text in one["outside"]] == [
        "experts per layer: 4",
        "MoE layers: 12",
    ]
    assert one["ways"]["upcycle"]["loss"] is None
    assert one["ways"]["upcycle"]["gpu_hours"]["value"] > 0


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "nemotron"])
def test_every_family_is_taken_and_the_gpus_are_found(tmp_path: Path, family: str) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(CONFIG | {"model_type": family} | FAMILIES[family])
    )
    words = ("--dense", str(tmp_path / "config.json"), "--dense-tokens", "1e9", "--tokens", "1e9")
    one = found(*words)
    assert one["moe"]["world_size"] == 8
    assert one["outside"][0].startswith("N1")


CLEAR = [
    (("--dense-tokens", "many"), "--dense-tokens is 'many'; expected a number of tokens, such as"),
    (("--dense-tokens", "-1B"), "--dense-tokens is '-1B'"),
    (("--tokens", "0"), "--tokens is '0'"),
    (("--tokens", "1,5B"), "--tokens is '1,5B'"),
    (("--tokens", "nan"), "--tokens is 'nan'"),
    (("--tokens", "1e999"), "--tokens is '1e999'"),
    (("--price", "-1"), "--price is -1; expected a number of 0 or more"),
    (("--price", "nan"), "--price is nan"),
    (("--hardware", "nope"), "There is no hardware 'nope'"),
    (("--out", "worth.doc"), "worth.doc has no suffix of a figure"),
    (("--experts", "1"), "num_moe_experts is 1"),
    (("--dense", "/nowhere"), "/nowhere"),
]


@pytest.mark.parametrize(("words", "message"), CLEAR)
def test_errors_are_one_line(small: str, words: tuple[str, ...], message: str) -> None:
    result = run("--dense", small, *SMALL_WORDS, *words)
    assert result.exit_code == 1, result.output
    (line,) = result.output.strip().splitlines()
    assert message in line


def test_what_does_not_fit_is_one_line(llama3_8b: str) -> None:
    result = run("--dense", llama3_8b, *BIG_WORDS, "--gpus", "1")
    assert result.exit_code == 1
    (line,) = result.output.strip().splitlines()
    assert line.startswith("Error: Nothing fits")


@pytest.mark.parametrize("text", ["20B", "20b", "20 B", "2e10", "20000000000", "0.02T", "20000M"])
def test_numbers_of_tokens(text: str) -> None:
    assert count("--tokens", text) == pytest.approx(20e9)

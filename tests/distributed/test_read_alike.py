"""A Hugging Face directory is the same model, or the same refusal, on one rank and on two."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.errors import UpcyclingError
from tests.distributed.pool import RankPool, nemo_recipe
from tests.tiny import CONFIG, LLAMA31_ROPE, tokens, write_dense

IDS = tokens(rows=2, length=100)
TP2 = ParallelFolding(tensor_model_parallel_size=2)
TOLERANCE = 1e-4

Weights = dict[str, torch.Tensor]
Config = dict[str, Any]
MLP = "model.layers.1.mlp.down_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"

MOES: dict[str, Config] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 96,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "head_dim": 16,
    },
}
_MOE_CLASSES = {"mixtral": "Mixtral", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe"}


def write_moe(directory: Path, kind: str, **config: Any) -> Path:
    """Write a random MoE; the gate of a shared expert is 0, as `export` leaves it."""
    torch.manual_seed(0)
    name = _MOE_CLASSES[kind]
    model_config = getattr(transformers, f"{name}Config")(**(CONFIG | MOES[kind] | config))
    model = getattr(transformers, f"{name}ForCausalLM")(model_config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("shared_expert_gate.weight"):
                parameter.zero_()
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    model.save_pretrained(directory)
    return directory


def as_transformers_5(config: Config) -> None:
    """Say RoPE in the words of transformers 5, and in those alone."""
    rope = dict(config.pop("rope_scaling", None) or {"rope_type": "default"})
    rope["rope_theta"] = config.pop("rope_theta")
    config["rope_parameters"] = rope


def lacking(*words: str) -> Callable[[Weights], Weights]:
    return lambda weights: {
        name: value for name, value in weights.items() if not any(w in name for w in words)
    }


def prefixed(weights: Weights) -> Weights:
    return {f"language_model.{name}": value for name, value in weights.items()}


def with_more(weights: Weights) -> Weights:
    return weights | {"model.layers.1.extra.weight": torch.ones(3, 3)}


def narrower(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: weights[name][:, :-1].contiguous()}


def with_nan(name: str) -> Callable[[Weights], Weights]:
    def change(weights: Weights) -> Weights:
        weights[name][5, 5] = float("nan")
        return weights

    return change


DAMAGED: dict[str, tuple[str, Callable[[Weights], Weights], Config, str]] = {
    "no output layer": ("llama", lacking("lm_head"), {}, "1 missing: lm_head.weight"),
    "no feed-forward layer": ("llama", lacking(".1.mlp."), {}, "3 missing: model.layers.1.mlp."),
    "all names prefixed": ("llama", prefixed, {}, "39 missing: lm_head.weight"),
    "a tensor too many": ("llama", with_more, {}, "1 not known: model.layers.1.extra.weight"),
    "a misshapen tensor": ("llama", narrower(MLP), {}, f"{MLP} is [64, 95], expected [64, 96]"),
    "NaN": ("llama", with_nan(MLP), {}, f"Tensor {MLP} of DIRECTORY holds NaN or Inf"),
    "tied by its config alone": (
        *("llama", lambda weights: weights),
        {"tie_word_embeddings": True},
        "lm_head.weight differs from model.embed_tokens.weight",
    ),
    "another number of layers": ("llama", lambda w: w, {"num_hidden_layers": 5}, "9 missing"),
    "RoPE of a kind that is not computed": (
        *("llama", lambda weights: weights),
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "'dynamic'",
    ),
    "an MoE without an expert's weights": ("mixtral", lacking(EXPERT), {}, f"has no {EXPERT}"),
    "an MoE without an output layer": (
        "qwen2_moe",
        lacking("lm_head"),
        {},
        "has no lm_head.weight",
    ),
    "an MoE with all names prefixed": (
        *("qwen3_moe", prefixed, {}),
        "has no model.embed_tokens.weight",
    ),
    "an MoE with a tensor too many": (
        *("mixtral", with_more, {}),
        "has no place for 1 tensors of DIRECTORY: model.layers.1.extra.weight",
    ),
    "an MoE with a misshapen tensor": ("mixtral", narrower(EXPERT), {}, "[64, 95]"),
    "an MoE with NaN": ("mixtral", with_nan(EXPERT), {}, f"Tensor {EXPERT} of DIRECTORY holds NaN"),
    "an MoE with more experts in its config": (
        *("mixtral", lambda weights: weights, {"num_local_experts": 8}),
        "The config belongs to another model",
    ),
}
"""By name: the family, what is done to its tensors and its config, and what is said."""

LINEAR = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
GOOD: dict[str, tuple[str, Config]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, RoPE base": ("llama", {"rope_theta": 5e5}),
    "llama, linear RoPE": ("llama", LINEAR | {"rope_theta": 5e5}),
    "llama, Llama 3.1's RoPE": ("llama", {"rope_scaling": LLAMA31_ROPE, "rope_theta": 5e5}),
    "mistral, window": ("mistral, window", {"rope_theta": 5e5}),
    "qwen2": ("qwen2", {"rope_theta": 5e5}),
    "qwen3": ("qwen3", {"rope_theta": 5e5}),
    "mixtral": ("mixtral", {"rope_theta": 5e5}),
    "qwen2_moe": ("qwen2_moe", {"rope_theta": 5e5}),
    "qwen3_moe": ("qwen3_moe", {"rope_theta": 5e5}),
}


def write(directory: Path, kind: str, **config: Any) -> Path:
    return (write_moe if kind in MOES else write_dense)(directory, kind, **config)


def change_config(directory: Path, change: Callable[[Config], Any]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@nemo_recipe
def opened(sources: dict[str, Path], folding: ParallelFolding) -> dict[str, Any]:
    """Return of each directory its logits, or what is said."""
    from nemo_upcycle.evaluation.opening import open_model

    found: dict[str, Any] = {}
    for name, source in sources.items():
        try:
            found[name] = open_model(source, folding)(IDS).logits.detach().float()
        except UpcyclingError as error:
            found[name] = str(error).replace(str(source), "DIRECTORY")
    return found


@pytest.fixture(scope="module")
def answers(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor]]:
    """What one rank and two make of every directory, and transformers' own logits."""
    root, sources, expected = tmp_path_factory.mktemp("alike"), {}, {}
    for name, (kind, damage, config, _) in DAMAGED.items():
        sources[name] = write(root / name, kind)
        weights = damage(load_file(root / name / "model.safetensors"))
        save_file(weights, root / name / "model.safetensors", {"format": "pt"})
        change_config(root / name, lambda found, config=config: found.update(config))
    for name, (kind, config) in GOOD.items():
        sources[name] = write(root / name, kind, **config)
        model = transformers.AutoModelForCausalLM.from_pretrained(root / name)
        with torch.no_grad():
            expected[name] = model(IDS).logits
        sources[f"{name}, 5"] = Path(shutil.copytree(root / name, root / f"{name}, 5"))
        change_config(root / f"{name}, 5", as_transformers_5)
    (one,) = ranks.run(opened, 1, sources=sources, folding=ParallelFolding())
    two, other = ranks.run(opened, 2, sources=sources, folding=TP2)
    for name in DAMAGED:
        assert two[name] == other[name]
    return one, two, expected


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_refused_in_the_same_words(answers: Any, name: str) -> None:
    one, two, _ = answers
    assert isinstance(one[name], str), "opened"
    assert DAMAGED[name][3] in one[name]
    # A rank reads its part of a tensor; the other may not have seen what is in it.
    assert one[name] == two[name].removeprefix("rank 0: ")


@pytest.mark.parametrize("words", ["4", "5"])
@pytest.mark.parametrize("name", GOOD)
def test_logits_are_transformers(answers: Any, name: str, words: str) -> None:
    one, two, expected = answers
    case = name if words == "4" else f"{name}, 5"
    for found in (one[case], two[case]):
        assert not isinstance(found, str), found
        assert (found - expected[name]).abs().max() <= TOLERANCE


def test_the_dtype_is_the_tensors(ranks: RankPool, tmp_path: Path) -> None:
    """A config may say another."""
    source = write_dense(tmp_path / "dense", "llama")
    file = source / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, {"format": "pt"})
    sources = {"dense": source}
    (one,) = ranks.run(opened, 1, sources=sources, folding=ParallelFolding())
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(IDS).logits.float()
    assert torch.equal(one["dense"], expected)


OTHERS: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "a tensor missing": (
        lacking("h.1.mlp.c_fc.weight"),
        "1 missing: transformer.h.1.mlp.c_fc.weight",
    ),
    "all names prefixed": (prefixed, "missing"),
    "a tensor too many": (with_more, "1 not known: model.layers.1.extra.weight"),
    "a misshapen tensor": (
        narrower("transformer.wpe.weight"),
        "transformer.wpe.weight is [128, 63], expected [128, 64]",
    ),
    "NaN": (with_nan("transformer.wte.weight"), "holds NaN or Inf"),
    "whole": (lambda weights: weights, ""),
}


def test_a_family_of_transformers_alone_is_whole_or_refused(
    ranks: RankPool, tmp_path: Path
) -> None:
    """GPT-2, whose output layer is its embeddings and is in no file."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=128, initializer_range=0.1
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    sources = {}
    for name, (damage, _) in OTHERS.items():
        sources[name] = tmp_path / name
        model.save_pretrained(sources[name])
        file = sources[name] / "model.safetensors"
        save_file(damage(load_file(file)), file, {"format": "pt"})
    (found,) = ranks.run(opened, 1, sources=sources, folding=ParallelFolding())
    with torch.no_grad():
        assert (found.pop("whole") - model(IDS).logits).abs().max() <= TOLERANCE
    for name, said in found.items():
        assert OTHERS[name][1] in said
    refused, _ = ranks.run(opened, 2, sources={"gpt2": sources["whole"]}, folding=TP2)
    assert "model_type='gpt2', which Megatron does not compute here" in refused["gpt2"]


@nemo_recipe
def texts(source: Path, tokenizer: Path, folding: ParallelFolding, count: int) -> str:
    """Go on from a prompt as `generate` does."""
    from nemo_upcycle.evaluation.checks import open_tokenizer
    from nemo_upcycle.evaluation.generation import go_on, prompt_ids
    from nemo_upcycle.evaluation.opening import open_model

    chosen = open_tokenizer(tokenizer)
    ids = prompt_ids(chosen, "def main(", None)
    return go_on(open_model(source, folding), chosen, ids, count)


def test_generation_ends_at_every_eos_of_the_generation_config(
    ranks: RankPool, tmp_path: Path
) -> None:
    """On one rank and on two; penalties that a file asks for are not what is asked for here."""
    from tests.workspace import make_workspace

    dense = make_workspace(tmp_path) / "dense_hf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(dense)
    settings = {"tokenizer": dense, "count": 16}
    (whole,) = ranks.run(texts, 1, source=dense, folding=ParallelFolding(), **settings)
    prompt, ids = (tokenizer(text)["input_ids"] for text in ("def main(", whole))
    made = ids[len(prompt) :]
    stop = next(token for token in made if token != made[0])
    (dense / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [tokenizer.eos_token_id, stop], "repetition_penalty": 5.0})
    )
    expected = tokenizer.decode([*prompt, *made[: made.index(stop) + 1]])
    (one,) = ranks.run(texts, 1, source=dense, folding=ParallelFolding(), **settings)
    for found in (one, *ranks.run(texts, 2, source=dense, folding=TP2, **settings)):
        assert found == expected

"""The configs of an exported MoE: its own numbers, and what the dense model's files said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.checkpoint.kept import kept_of
from nemo_upcycle.trained.configs import config_of
from nemo_upcycle.trained.export import Export, export, plan_export
from tests.moe_checkpoints import KINDS, moe_weights, save_moe
from tests.tiny import CONFIG, LLAMA31_ROPE

TOKENS = {"bos_token_id": 3, "eos_token_id": [7, 9], "pad_token_id": 5}
LLAMA = {**CONFIG, "model_type": "llama"}


def saved(directory: Path, kind: str = "plain", kept: Any = None, **config: Any) -> Path:
    """Write an MoE; `kept` is what its run has recorded of the dense model."""
    source = save_moe(directory / "saved", KINDS[kind], moe_weights(KINDS[kind]), **config)
    common = source / "weights" / "common.pt"
    callbacks = {"UpcyclingCallback": {"kept": kept}} if kept else {}
    torch.save({"callbacks": callbacks}, common)
    return source


def dense(directory: Path, config: dict[str, Any], **files: Any) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def read(directory: Path, name: str = "config") -> dict[str, Any]:
    return json.loads((directory / f"{name}.json").read_text())


def written(source: Path, directory: Path) -> tuple[Export, dict[str, Any]]:
    return export(source, directory), read(directory)


# --- The model's own numbers ---------------------------------------------------------------------


def test_numbers_of_a_mixtral(tmp_path: Path) -> None:
    _, config = written(saved(tmp_path, "granular"), tmp_path / "hf")
    assert config["architectures"] == ["MixtralForCausalLM"]
    said = {
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 6,  # of an expert
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    assert {name: config[name] for name in said} == said


def test_numbers_of_a_qwen2_moe(tmp_path: Path) -> None:
    source = saved(tmp_path, "partly dense, shared expert")
    _, config = written(source, tmp_path / "hf")
    said = {
        "intermediate_size": 12,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 12,
        "num_experts": 4,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
        "qkv_bias": False,
    }
    assert {name: config[name] for name in said} == said


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({}, None),
        ({"seq_len_interpolation_factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "scale_factor": LLAMA31_ROPE["factor"],
                "low_freq_factor": LLAMA31_ROPE["low_freq_factor"],
                "high_freq_factor": LLAMA31_ROPE["high_freq_factor"],
                "old_context_len": LLAMA31_ROPE["original_max_position_embeddings"],
            },
            LLAMA31_ROPE,
        ),
    ],
    ids=["none", "linear", "Llama 3.1"],
)
def test_rope_scaling(tmp_path: Path, fields: dict[str, Any], rope: dict[str, Any] | None) -> None:
    plan = plan_export(saved(tmp_path, **fields))
    assert config_of(plan.model, plan.family, "F32")["rope_scaling"] == rope


# --- What the dense model's files said -----------------------------------------------------------


def test_tokens_and_generation_config_are_kept(tmp_path: Path) -> None:
    generation = {"do_sample": True, "temperature": 0.6, "eos_token_id": [7, 9, 11]}
    source = dense(tmp_path / "dense", LLAMA | TOKENS, generation_config=generation)
    plan, config = written(saved(tmp_path, kept=kept_of(source)), tmp_path / "hf")
    assert {name: config[name] for name in TOKENS} == TOKENS
    assert read(tmp_path / "hf", "generation_config") == generation
    assert plan.notes == []


@pytest.mark.parametrize("kind", ["plain", "softmax first"])
def test_tokens_that_were_not_said_are_those_of_the_dense_model(tmp_path: Path, kind: str) -> None:
    """What transformers takes for a Llama unsaid is not what it takes for a Qwen2-MoE."""
    from transformers import AutoConfig

    source = dense(tmp_path / "dense", LLAMA)
    export(saved(tmp_path, kind, kept_of(source)), tmp_path / "hf")
    before, after = (AutoConfig.from_pretrained(tmp_path / name) for name in ("dense", "hf"))
    for name in TOKENS:
        assert getattr(after, name) == getattr(before, name), name


def test_chat_templates_beside_the_tokenizers_own_are_kept(tmp_path: Path) -> None:
    source = dense(tmp_path / "dense", LLAMA)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    export(saved(tmp_path, kept=kept_of(source)), tmp_path / "hf")
    copied = tmp_path / "hf" / "additional_chat_templates" / "tools.jinja"
    assert copied.read_text() == "{{ tools }}"


def test_the_context_is_the_dense_models(tmp_path: Path) -> None:
    """The run's sequences were shorter, and so there was no window."""
    config = LLAMA | {"model_type": "mistral", "sliding_window": 64}
    kept = kept_of(dense(tmp_path / "dense", config))
    _, config = written(saved(tmp_path, kept=kept, seq_length=32), tmp_path / "hf")
    assert (config["max_position_embeddings"], config["sliding_window"]) == (128, 64)


def test_a_window_that_training_did_without_is_none(tmp_path: Path) -> None:
    config = LLAMA | {"model_type": "mistral", "sliding_window": 16}
    kept = kept_of(dense(tmp_path / "dense", config))
    _, config = written(saved(tmp_path, kept=kept, seq_length=32), tmp_path / "hf")
    assert config["sliding_window"] is None


def test_what_an_older_checkpoint_does_not_say_is_assumed_aloud(tmp_path: Path) -> None:
    plan, config = written(saved(tmp_path), tmp_path / "hf")
    (note,) = plan.notes
    assert "max_position_embeddings is the run's 32, there is no sliding window" in note
    assert "no token ids are said" in note
    assert config["max_position_embeddings"] == 32
    assert not (tmp_path / "hf" / "generation_config.json").exists()


# --- The tokenizer -------------------------------------------------------------------------------


def test_a_tokenizer_that_says_other_tokens_is_told_once(tmp_path: Path, tokenizer: Path) -> None:
    source = saved(tmp_path, kept=kept_of(dense(tmp_path / "dense", LLAMA | TOKENS)))
    (tokenizer_copy := source / "context" / "tokenizer").mkdir()
    for file in tokenizer.iterdir():
        (tokenizer_copy / file.name).write_bytes(file.read_bytes())
    plan, config = written(source, tmp_path / "hf")
    (eos,) = (note for note in plan.notes if "eos_token_id" in note)
    assert "the tokenizer's eos_token_id is 1 (</s>)" in eos
    assert "each is kept as the dense model has it" in eos
    assert config["eos_token_id"] == TOKENS["eos_token_id"]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / file).read_bytes() == (tokenizer / file).read_bytes()


def test_without_a_record_tokens_are_the_tokenizers(tmp_path: Path, tokenizer: Path) -> None:
    source = saved(tmp_path)
    (source / "context" / "tokenizer").mkdir()
    for file in tokenizer.iterdir():
        (source / "context" / "tokenizer" / file.name).write_bytes(file.read_bytes())
    plan, config = written(source, tmp_path / "hf")
    assert "token ids are the tokenizer's" in plan.notes[0]
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    assert read(tmp_path / "hf", "generation_config") == {
        "_from_model_config": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }

"""The model's config against the dense checkpoint's, field by field."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nemo.collections.llm.gpt.model.base import GPTConfig
from nemo.collections.llm.gpt.model.llama import Llama31Config, LlamaConfig

from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.engine import cpu
from nemo_upcycle.engine.agreement import check_agreement, exactness_of
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture, architecture_of
from nemo_upcycle.families.fields import moe_fields, upcycling_in, window_fields
from nemo_upcycle.nemo.model import UpcycledGPTConfig, architecture_fields, is_llama
from tests.tiny import CONFIG, FAMILIES, LLAMA31_ROPE, write_dense

KINDS = {**FAMILIES, "llama, llama3 RoPE": {"rope_scaling": LLAMA31_ROPE}}


def architecture(kind: str, **change: Any) -> Architecture:
    config = {**CONFIG, **KINDS[kind], "model_type": kind.partition(",")[0], **change}
    return architecture_of(config)


def config_of(arch: Architecture, seq_length: int = 64, **fields: Any) -> Any:
    of_dense = architecture_fields(arch) | window_fields(arch, seq_length)
    moe = moe_fields(arch, UpcyclingConfig())
    return UpcycledGPTConfig(
        **(moe | of_dense | cpu.MODEL_OVERRIDES | {"seq_length": seq_length} | fields)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seq_length", [8, 64])
def test_a_model_made_from_the_checkpoint_agrees(kind: str, seq_length: int) -> None:
    """With a window (of 16) that sequences are longer than, and shorter."""
    arch = architecture(kind)
    check_agreement(config_of(arch, seq_length), arch)
    if is_llama(arch):
        ours = architecture_fields(arch)
        nemo = LlamaConfig if arch.rope_scaling is None else Llama31Config
        check_agreement(nemo(**ours, **cpu.MODEL_OVERRIDES), arch)


DIFFERENT: dict[str, tuple[str, dict[str, Any], str]] = {
    "a Gemma's factor": (
        "gemma",
        {"rounded_embedding_multiplier": 1.0},
        "rounded_embedding_multiplier is 1.0, expected 8.0",
    ),
    "a Gemma's function": ("gemma", {"activation_func": F.gelu}, "is 'gelu', expected 'gelu_tanh'"),
    "a StableLM's norms": (
        "stablelm",
        {"layernorm_zero_centered_gamma": True},
        "layernorm_zero_centered_gamma is True, expected False",
    ),
    "RoPE base": ("llama", {"rotary_base": 5e5}, "rotary_base is 500000.0, expected 10000.0"),
    "no RoPE scaling": ("llama, llama3 RoPE", {"scale_factor": None}, "is None, expected 4.0"),
    "RoPE scaling where there is none": ("llama", {"scale_factor": 8.0}, "is 8.0, expected None"),
    "RoPE scaling: low": (
        "llama, llama3 RoPE",
        {"low_freq_factor": 1.0},
        "low_freq_factor is 1.0, expected 1.5",
    ),
    "RoPE scaling: high": (
        "llama, llama3 RoPE",
        {"high_freq_factor": 4.0},
        "high_freq_factor is 4.0, expected 3.0",
    ),
    "RoPE scaling: length": (
        "llama, llama3 RoPE",
        {"old_context_len": 8192},
        "old_context_len is 8192, expected 32",
    ),
    "linear factor": (
        "llama, linear RoPE",
        {"seq_len_interpolation_factor": None},
        "seq_len_interpolation_factor is None, expected 2.0",
    ),
    "rotated part": ("nemotron", {"rotary_percent": 1.0}, "rotary_percent is 1.0, expected 0.5"),
    "no window": ("mistral, window", {"window_size": None}, "is None, expected (15, 0)"),
    "NeMo's window": ("mistral, window", {"window_size": (16, 0)}, "(16, 0), expected (15, 0)"),
    "a window": ("mistral", {"window_size": [15, 0]}, "window_size is (15, 0), expected None"),
    "norms' epsilon": ("llama", {"layernorm_epsilon": 1e-6}, "is 1e-06, expected 1e-05"),
    "kind of norm": (
        "llama",
        {"normalization": "LayerNorm"},
        "normalization is 'LayerNorm', expected 'RMSNorm'",
    ),
    "norms' weights less 1": (
        "nemotron",
        {"layernorm_zero_centered_gamma": False},
        "layernorm_zero_centered_gamma is False, expected True",
    ),
    "biases": ("qwen2", {"add_qkv_bias": False}, "add_qkv_bias is False, expected True"),
    "biases everywhere": ("llama", {"add_bias_linear": True}, "is True, expected False"),
    "q/k norms": ("qwen3", {"qk_layernorm": False}, "qk_layernorm is False, expected True"),
    "activation": (
        "llama",
        {"activation_func": torch.nn.functional.gelu},
        "activation_func is 'gelu', expected 'silu'",
    ),
    "gate": ("llama", {"gated_linear_unit": False}, "gated_linear_unit is False, expected True"),
    "tied": (
        "qwen2, tied",
        {"share_embeddings_and_output_weights": False},
        "share_embeddings_and_output_weights is False, expected True",
    ),
    "vocabulary": ("llama", {"vocab_size": 300}, "vocab_size is 300, expected 256"),
    "smaller vocabulary": ("llama", {"vocab_size": 255}, "vocab_size is 255, expected 256"),
    "heads": ("llama", {"num_attention_heads": 4}, "num_attention_heads is 4, expected 8"),
    "groups": ("llama", {"num_query_groups": 8}, "num_query_groups is 8, expected 4"),
    "head size": ("qwen3", {"kv_channels": 8}, "kv_channels is 8, expected 16"),
    "layers": ("llama", {"num_layers": 2}, "num_layers is 2, expected 4"),
    "softmax": ("llama", {"softmax_scale": 1.0}, "softmax_scale is 1.0, expected None"),
    "no position": (
        "llama",
        {"position_embedding_type": "learned_absolute"},
        "position_embedding_type is 'learned_absolute', expected 'rope'",
    ),
    "norm before the branch": (
        "llama",
        {"apply_residual_connection_post_layernorm": True},
        "apply_residual_connection_post_layernorm is True",
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_another_model_is_named(case: str) -> None:
    kind, change, message = DIFFERENT[case]
    arch = architecture(kind)
    config = config_of(arch)
    for name, value in change.items():  # as an override of the built config would
        setattr(config, name, value)
    with pytest.raises(UpcyclingError) as error:
        check_agreement(config, arch)
    assert message in str(error.value)
    assert str(error.value).count(", expected ") == 1


def test_all_differences_are_in_one_error() -> None:
    arch = architecture("llama", rope_theta=5e5, rms_norm_eps=1e-6)
    with pytest.raises(UpcyclingError) as error:
        check_agreement(config_of(architecture("llama")), arch)
    for words in ("rotary_base is 10000.0, expected 500000.0", "1e-05, expected 1e-06"):
        assert words in str(error.value)


def test_nemos_own_configs_are_compared_by_the_same_fields() -> None:
    """NeMo's plain Llama has no RoPE scaling, its GPT is no Llama at all."""
    arch = architecture("llama, llama3 RoPE")
    fields = architecture_fields(dataclasses.replace(arch, rope_scaling=None))
    with pytest.raises(UpcyclingError, match=r"scale_factor is None, expected 4\.0"):
        check_agreement(LlamaConfig(**fields, **cpu.MODEL_OVERRIDES), arch)
    with pytest.raises(UpcyclingError) as error:
        check_agreement(GPTConfig(**fields), architecture("llama"))
    for words in ("'learned_absolute', expected 'rope'", "'gelu', expected 'silu'", "LayerNorm"):
        assert words in str(error.value)


OF_THE_RUN: dict[str, dict[str, Any]] = {
    "length": {"seq_length": 16},
    "how weights would be drawn": {"init_method_std": 0.5},
    "vocabulary padded for TP": {"vocab_size": 258, "tensor_model_parallel_size": 3},
    "vocabulary padded to a multiple of 128": {"vocab_size": 384, "tensor_model_parallel_size": 3},
    "dropout": {"hidden_dropout": 0.1},
    "precision": {"bf16": True},
    "experts": {"num_moe_experts": 4, "moe_aux_loss_coeff": 0.0},
    "no experts": {"num_moe_experts": None},
}


@pytest.mark.parametrize("case", OF_THE_RUN)
def test_what_is_the_runs_own_may_differ(case: str) -> None:
    arch = architecture("llama")
    config = config_of(arch)
    for name, value in OF_THE_RUN[case].items():
        setattr(config, name, value)
    check_agreement(config, arch)


def test_a_vocabulary_that_is_the_tokenizers() -> None:
    arch = architecture("llama")
    config = config_of(arch)
    config.vocab_size = None
    for size in (250, 256):  # both padded to 256
        check_agreement(config, arch, tokenizer_size=size)
    with pytest.raises(UpcyclingError, match="vocab_size is 384, expected 256"):
        check_agreement(config, arch, tokenizer_size=257)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"moe_router_topk_scaling_factor": 2.5}, "moe_router_topk_scaling_factor=2.5"),
        ({"moe_router_score_function": "sigmoid"}, None),
        ({"moe_router_num_groups": 4}, "moe_router_num_groups=4 makes the router differ from"),
        ({"moe_input_jitter_eps": 0.1}, "moe_input_jitter_eps=0.1"),
    ],
)
def test_another_router_is_not_called_exact(change: dict[str, Any], words: str | None) -> None:
    arch = architecture("llama")
    config = config_of(arch)
    for name, value in change.items():
        setattr(config, name, value)
    found = exactness_of(config, upcycling_in(config), arch, 1)
    assert found.exact is (words is None)
    assert words is None or words in found.reason
    assert exactness_of(config, UpcyclingConfig(num_moe_experts=None), arch, 1).exact


def test_a_checkpoint_of_disk_is_what_its_recipe_makes(tmp_path: Path) -> None:
    """The whole way: a directory, the factory, the built config."""
    import fiddle
    from nemo_upcycle_recipes.llama_tiny import dense_recipe, upcycled_recipe

    for kind in ("llama, linear RoPE", "llama, llama3 RoPE", "mistral, window", "nemotron"):
        values = {**KINDS[kind], "rope_theta": 5e5}
        dense = write_dense(tmp_path / kind, kind, **values)
        config = {**CONFIG, **values, "model_type": kind.split(",")[0]}
        arch = architecture_of(config)
        for factory in (dense_recipe, upcycled_recipe):
            recipe = factory(dense_checkpoint=str(dense), accelerator="cpu")
            check_agreement(fiddle.build(recipe.model.config), arch)

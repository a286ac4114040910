"""What a Megatron checkpoint's config asks for."""

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemo_upcycle.checkpoint import open_checkpoint
from nemo_upcycle.errors import UpcyclingError
from tests.megatron_checkpoints import (
    ARGS,
    NUMBERS,
    VOCAB,
    architecture,
    save,
    save_nemo,
    tensors,
)


def test_rope_scaling_of_both_kinds(tmp_path: Path) -> None:
    lm = save(tmp_path / "lm", tensors())
    scaled = Namespace(**ARGS, use_rope_scaling=True, rope_scaling_factor=32.0)
    torch.save({"args": scaled}, lm / "common.pt")
    nemo = save_nemo(
        tmp_path / "nemo",
        tensors(),
        scale_factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        old_context_len=8192,
    )
    expected = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert architecture(lm).rope_scaling == architecture(nemo).rope_scaling == expected


UNSUPPORTED = {
    "num_moe_experts": (8, "is an MoE already"),
    "add_qkv_bias": (True, "do not fit its config .* missing: .*linear_qkv.bias"),
    "add_bias_linear": (True, "add_bias_linear"),
    "qk_layernorm": (True, "missing: .*q_layernorm.weight"),
    "normalization": ("L2Norm", "normalization='L2Norm'"),
    "activation_func": ("megatron.core.activations.squared_relu", "squared_relu"),
    "position_embedding_type": ("learned_absolute", "position_embedding_type"),
    "window_size": ([4096, 1], "window_size"),
    "num_query_groups": (3, "to divide the first"),
    "num_layers": ("two", "num_layers='two'; expected a positive integer"),
    "kv_channels": (2**31, "kv_channels=2147483648; expected a positive integer, at most"),
    "rotary_base": (math.nan, "rotary_base=nan; expected a positive number"),
    "layernorm_epsilon": (math.inf, "layernorm_epsilon=inf; expected a positive number"),
    "init_method_std": (10**400, "…; expected a positive number"),
    "hidden_size": (None, "hidden_size=None"),
    "ffn_hidden_size": (10, "do not fit its config"),
    "vocab_size": (VOCAB + 1, "do not fit its config"),
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_a_config_asks_for_and_cannot_be_upcycled(tmp_path: Path, field: str) -> None:
    value, message = UNSUPPORTED[field]
    with pytest.raises(UpcyclingError, match=message):
        architecture(save_nemo(tmp_path / "nemo", tensors(), **{field: value}))


def test_a_config_cut_in_half_is_one_line(tmp_path: Path) -> None:
    nemo = save_nemo(tmp_path / "nemo", tensors())
    model = nemo / "context" / "model.yaml"
    model.write_text(json.dumps(yaml.safe_load(model.read_text()))[:80])
    with pytest.raises(UpcyclingError, match=r"cannot be read as NeMo 2's model\.yaml") as error:
        open_checkpoint(str(nemo))
    assert "\n" not in str(error.value)


SILU = {"_target_": "torch.nn.functional.silu", "_call_": False}
PROVIDER = {"_target_": "megatron.bridge.models.llama.llama_provider.Llama3ModelProvider8B"}
BRIDGE = {"_target_": "megatron.bridge.models.gpt.model_config.BridgeGPTModelConfig"}
OWN = {"_target_": "megatron.training.models.gpt.GPTModelConfig"}
OF_LLAMA = {**NUMBERS, "position_embedding_type": "rope", "normalization": "RMSNorm"}
GATED = {"gated_linear_unit": True}


def save_bridge(directory: Path, model: dict[str, Any]) -> Path:
    """Write a checkpoint with the `run_config.yaml` of Megatron-Bridge."""
    save(directory, tensors())
    text = yaml.safe_dump({"_target_": "megatron.bridge.ConfigContainer", "model": model})
    (directory / "run_config.yaml").write_text(text)
    return directory


BRIDGES: dict[str, dict[str, Any]] = {
    "a provider": {**PROVIDER, **OF_LLAMA, **GATED, "activation_func": SILU},
    "a config": {**BRIDGE, "transformer": {**OF_LLAMA, **GATED, "activation_func": "silu"}},
    "Megatron's own config, with a record": {
        **OWN,
        "transformer": {**OF_LLAMA, **GATED},
        "extra_checkpoint_metadata": {"model_fields": {"activation_func": "silu"}},
    },
}


@pytest.mark.parametrize("name", BRIDGES)
def test_what_bridge_writes_is_read(tmp_path: Path, name: str) -> None:
    arch = architecture(save_bridge(tmp_path / "run", BRIDGES[name]))
    assert arch == architecture(save_nemo(tmp_path / "nemo", tensors()))


BRIDGES_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no function": (
        {**OWN, "transformer": {**OF_LLAMA, **GATED}},
        "does not say which activation function",
    ),
    "another function": (
        {**BRIDGE, "transformer": {**OF_LLAMA, **GATED, "activation_func": "fast_gelu"}},
        "activation_func='fast_gelu' with gated_linear_unit=True",
    ),
    "a class that computes more": (
        {
            "_target_": "megatron.bridge.models.gemma.gemma2_provider.Gemma2ModelProvider",
            **OF_LLAMA,
            **GATED,
            "activation_func": SILU,
        },
        "says that the model is a Gemma2ModelProvider, which may compute more",
    ),
    "a class of several parts": (
        {
            "_target_": "megatron.bridge.models.qwen_vl.Qwen3VLModelProvider",
            **OF_LLAMA,
            **GATED,
            "activation_func": SILU,
        },
        "Qwen3VLModelProvider",
    ),
}


@pytest.mark.parametrize("name", BRIDGES_REFUSED)
def test_what_bridge_writes_and_nobody_knows_is_refused(tmp_path: Path, name: str) -> None:
    model, message = BRIDGES_REFUSED[name]
    with pytest.raises(UpcyclingError, match=message):
        architecture(save_bridge(tmp_path / "run", model))


def test_quick_geglu_is_no_swiglu(tmp_path: Path) -> None:
    directory = save(tmp_path / "lm", tensors())
    args = Namespace(**{**ARGS, "swiglu": False}, quick_geglu=True)
    torch.save({"args": args}, directory / "common.pt")
    with pytest.raises(UpcyclingError, match="quick_geglu=True; only False"):
        architecture(directory)

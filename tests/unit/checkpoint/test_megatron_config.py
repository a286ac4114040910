"""What a Megatron checkpoint's config asks for."""

import json
import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml

from nemo_upcycle.checkpoint import open_checkpoint
from nemo_upcycle.errors import UpcyclingError
from tests.megatron_checkpoints import (
    ARGS,
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
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert architecture(lm).rope_scaling == architecture(nemo).rope_scaling == expected


UNSUPPORTED = {
    "num_moe_experts": (8, "is an MoE already"),
    "add_qkv_bias": (True, "add_qkv_bias=True; only False"),
    "add_bias_linear": (True, "add_bias_linear"),
    "qk_layernorm": (True, "qk_layernorm"),
    "normalization": ("LayerNorm", "normalization='LayerNorm'"),
    "activation_func": ("megatron.core.activations.squared_relu", "squared_relu"),
    "position_embedding_type": ("learned_absolute", "position_embedding_type"),
    "window_size": ([4096, 0], "window_size"),
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

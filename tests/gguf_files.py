"""Tiny models in GGUF, as llama.cpp's converter writes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _permuted(values: np.ndarray, heads: int) -> np.ndarray:
    """Order rows of queries or keys as llama.cpp's `permute` does."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    for theirs, ours in NAMES.items():
        if module == theirs or module.endswith(f".{theirs}"):
            layer = f"blk.{module.split('.')[2]}." if module.startswith("model.layers") else ""
            return f"{layer}{ours}.{kind}"
    raise AssertionError(name)


def write_gguf(
    dense: Path,
    file: Path,
    kind: str,
    extra: dict[str, Any] | None = None,
    words: Sequence[str] = (),
    merges: Sequence[str] = ("t 1",),
) -> Path:
    """Write a dense Hugging Face directory, in fp32 and one file, as GGUF.

    Args:
        dense: The directory.
        file: The file to write.
        kind: ggml's name of the matrices' type; `Q6_K` is made of random bytes.
        extra: More metadata, functions of the writer and values.
        words: The vocabulary; without one, 256 words.
        merges: The merges of the tokenizer.

    Returns:
        The file's directory.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    config = json.loads((dense / "config.json").read_text())
    arch, heads = config["model_type"], config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(file, arch)
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(20000.0)
    if arch == "llama":
        writer.add_rope_dimension_count(width)
    if arch == "qwen3":
        writer.add_key_length(width)
        writer.add_value_length(width)
    for name, value in (extra or {}).items():
        getattr(writer, name)(*(value if isinstance(value, tuple) else (value,)))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list(words) or [f"t{number}" for number in range(256)])
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(3)
    writer.add_eos_token_id(4)
    random = np.random.default_rng(0)
    for name, values in load_file(dense / "model.safetensors").items():
        ours = _name(name)
        if arch == "llama" and ".attn_q." in ours:
            values = _permuted(values, heads)
        if arch == "llama" and ".attn_k." in ours:
            values = _permuted(values, config["num_key_value_heads"])
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(ours, values)
            continue
        type_ = GGMLQuantizationType[kind]
        if kind == "Q6_K":  # which gguf reads and does not write: scales of 2⁻¹⁰
            raw = random.integers(0, 256, (len(values), values.shape[1] // 256, 210), np.uint8)
            raw[..., 208:] = np.frombuffer(np.float16(2**-10).tobytes(), np.uint8)
            writer.add_tensor(ours, raw.reshape(len(values), -1), raw_dtype=type_)
        else:
            writer.add_tensor(ours, quantize(values, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.parent

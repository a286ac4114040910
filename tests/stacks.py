"""What both supported stacks have to make of the same dense weights, to the last bit.

NeMo 2 and Megatron's own training library cannot be installed together. Their tests run apart, and
compare with the digests below: where one changes, its tests fail.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 250,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
    "torch_dtype": "float32",
}

DIGESTS = {
    "copy": "0908bc63c685af98",
    "noise": "9794e3a157dca58d",
    "drop(ratio=0.3)": "4e571ecfee16748c",
    "random": "2cd1860486512776",
    "hybrid(copy, drop, noise(std=0.5), random)": "f213b369002d9a78",
    "branches": "b131701d43ff63c2",
}
"""Of all parameters of an E8T2, by initializer; of two dense models for `branches`."""


def write_by_numbers(directory: Path, salt: int = 0) -> Path:
    """Write a dense Llama whose weights no random generator and no library decides."""
    from nemo_upcycle.check.dense import by_numbers, write

    width, ffn = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes = {
        "model.embed_tokens.weight": (CONFIG["vocab_size"], width),
        "lm_head.weight": (CONFIG["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        shapes |= {
            name + "input_layernorm.weight": (width,),
            name + "post_attention_layernorm.weight": (width,),
            name + "self_attn.q_proj.weight": (64, width),
            name + "self_attn.k_proj.weight": (32, width),
            name + "self_attn.v_proj.weight": (32, width),
            name + "self_attn.o_proj.weight": (width, 64),
            name + "mlp.gate_proj.weight": (ffn, width),
            name + "mlp.up_proj.weight": (ffn, width),
            name + "mlp.down_proj.weight": (width, ffn),
        }
    return write(directory, CONFIG, by_numbers(shapes, salt))


def digest(parameters: Mapping[str, Any]) -> str:
    """Return what tells whole parameters from others, to the last bit."""
    found = hashlib.sha256()
    for name, values in sorted(parameters.items()):
        found.update(f"{name} {tuple(values.shape)}".encode())
        found.update(values.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


EXPORT_DIGEST = "5bc64fa738479123"
"""Of all files that an E8T2 of the weights above becomes for Hugging Face, from any checkpoint."""


def files_digest(directory: Path) -> str:
    """Return what tells a directory's files from others."""
    found = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]

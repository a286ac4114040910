"""A tiny dense Llama in Hugging Face's format, made by `transformers` itself."""

from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    # Large enough that attention and logits are far from uniform.
    "initializer_range": 0.1,
}

LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 32,
}


def write_llama(directory: Path, shard_size: str = "10GB", seed: int = 0, **config: Any) -> Path:
    """Write a random dense Llama with norms that are not 1, and its config.json."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(CONFIG | config)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(directory, max_shard_size=shard_size, safe_serialization=True)
    return directory


def tokens(rows: int, length: int, vocab_size: int = CONFIG["vocab_size"], seed: int = 1) -> Any:
    """Return random token ids, [rows, length]."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (rows, length), generator=generator)

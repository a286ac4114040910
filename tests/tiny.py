"""Tiny dense models in Hugging Face's format, made by `transformers` itself."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_upcycle.families import Architecture

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

LLAMA_400M: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
"""Not tiny, and only planned for: 403M parameters without embeddings."""

LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 32,
}


YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    # Of the four frequencies of a tiny head, one is mixed, and rounding shows.
    "beta_fast": 4.0,
    "beta_slow": 0.1,
    "original_max_position_embeddings": 32,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, YaRN": {"rope_scaling": YARN},
    "llama, linear RoPE": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "mistral": {"sliding_window": None},
    "mistral, window": {"sliding_window": 16},
    "qwen2": {},
    "qwen2, tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "nemotron": {},
    "smollm3": {"pad_token_id": 0},
    "granite": {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.25,
        "logits_scaling": 6.0,
    },
    "phi3": {"pad_token_id": 0, "partial_rotary_factor": 0.75, "sliding_window": 16},
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "stablelm, no biases": {"tie_word_embeddings": True},
}
"""By name, which begins with the model type: what is asked of `write_dense`."""

_CLASSES = {"smollm3": "SmolLM3", "stablelm": "StableLm"}
"""Names of classes that are not the model type with a capital letter."""

_EPSILONS = {"nemotron": "norm_eps", "stablelm": "layer_norm_eps"}


def write_llama(directory: Path, shard_size: str = "10GB", seed: int = 0, **config: Any) -> Path:
    """Write a random dense Llama with norms that are not 1, and its config.json."""
    return write_dense(directory, "llama", shard_size, seed, **config)


def write_dense(
    directory: Path, family: str, shard_size: str = "10GB", seed: int = 0, **config: Any
) -> Path:
    """Write a random dense model of a family, with norms and biases that do something."""
    import torch
    import transformers

    kind = family.partition(",")[0]
    name = _CLASSES.get(kind, kind.capitalize())
    torch.manual_seed(seed)
    values = CONFIG | FAMILIES.get(family, {}) | config
    if kind in _EPSILONS:
        values[_EPSILONS[kind]] = values.pop("rms_norm_eps")
    model_config = getattr(transformers, f"{name}Config")(**values)
    model = getattr(transformers, f"{name}ForCausalLM")(model_config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
            elif "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
                if kind in ("nemotron", "gemma"):  # which add 1
                    parameter.sub_(1)
    model.save_pretrained(directory, max_shard_size=shard_size, safe_serialization=True)
    return directory


def wide_architecture(**config: Any) -> "Architecture":
    """Return a Llama whose tensors are so large that padding them to 64 elements is no percent."""
    from nemo_upcycle.families import architecture_of

    sizes = {"hidden_size": 128, "intermediate_size": 192, "model_type": "llama"}
    return architecture_of(CONFIG | sizes | config)


def into_hub_cache(directory: Path, cache: Path, name: str) -> Path:
    """Lay a directory out as the Hugging Face hub's cache keeps a model; return the snapshot."""
    model = cache / f"models--{name.replace('/', '--')}"
    snapshot = model / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(snapshot.name)
    (model / "blobs").mkdir()
    for file in directory.iterdir():
        (model / "blobs" / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    return snapshot


def tokens(rows: int, length: int, vocab_size: int = CONFIG["vocab_size"], seed: int = 1) -> Any:
    """Return random token ids, [rows, length]."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (rows, length), generator=generator)

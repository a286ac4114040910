"""The dense model of a check: a tiny Llama by formula, or the first layers of a user's model."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nemo_upcycle.checkpoint import DenseCheckpoint, HuggingFaceCheckpoint, gguf_in, open_checkpoint
from nemo_upcycle.checkpoint.described import config_alone
from nemo_upcycle.checkpoint.dtypes import torch_dtype
from nemo_upcycle.checkpoint.huggingface import resolve_directory
from nemo_upcycle.errors import UpcyclingError, listing
from nemo_upcycle.families import architecture_of, family_of

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 250,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 16,
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
"""A Llama of which TP, ETP, CP and EP of 8 and 4 pipeline stages have equal parts."""


def write_tiny(directory: Path) -> Path:
    """Write the tiny Llama."""
    shapes = family_of(TINY).shapes(architecture_of(TINY))
    return write(directory, TINY, by_numbers(shapes))


def by_numbers(shapes: Mapping[str, tuple[int, ...]], salt: int = 0) -> dict[str, torch.Tensor]:
    """Return weights that no random generator and no library decides.

    Args:
        shapes: Shapes by name; the order counts.
        salt: Another number makes other weights.
    """
    tensors = {}
    for number, (name, shape) in enumerate(shapes.items()):
        count = torch.arange(prod(shape), dtype=torch.int64)
        mixed = (count * count * 40503 + count * 2654435 + 7919 * number + salt) % 65521
        tensors[name] = ((mixed - 32760).double() / 2**17).float().view(shape)
        if len(shape) == 1:
            tensors[name] += 1
    return tensors


def write_first_layers(source: str, layers: int, directory: Path) -> Path:
    """Write a dense model with the first layers of another one.

    Args:
        source: Directory of a Hugging Face checkpoint or a GGUF file, a `config.json`, or the name
            of a model in the local cache. With a config alone, weights are random.
        layers: Number of layers.
        directory: Directory to write.

    Raises:
        UpcyclingError: The model cannot be read or upcycled, or has fewer layers.
    """
    alone = config_alone(source)
    checkpoint = _opened(alone or source)
    config = _with_layers(checkpoint.config, layers)
    shapes = family_of(config).shapes(architecture_of(config))
    if alone is not None:
        return write(directory, config, _random(shapes, config))
    missing = [name for name in shapes if name not in checkpoint.tensors]
    if missing:
        raise UpcyclingError(
            f"{checkpoint.directory} lacks {len(missing)} tensors of its first {layers} layers: "
            f"{listing(missing)}. Give a complete Hugging Face checkpoint."
        )
    tensors = {name: _read(checkpoint, name) for name in shapes}
    checkpoint.close()
    return write(directory, config, tensors)


def _opened(source: str | Path) -> DenseCheckpoint:
    """Open a checkpoint whose config is Hugging Face's."""
    if gguf_in(resolve_directory(source)) is not None:
        return open_checkpoint(str(source))
    return HuggingFaceCheckpoint(source)


def _with_layers(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    there = config["num_hidden_layers"]
    if layers > there:
        raise UpcyclingError(f"--layers is {layers}, but the model has {there}; give fewer.")
    cut = {
        name: value[:layers] if isinstance(value, list) and len(value) == there else value
        for name, value in config.items()
    }
    return {**cut, "num_hidden_layers": layers}


def _random(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    std = config.get("initializer_range", 0.02)
    return {
        name: torch.ones(shape)
        if len(shape) == 1
        else torch.empty(shape).normal_(0.0, std, generator=generator)
        for name, shape in shapes.items()
    }


def _read(checkpoint: DenseCheckpoint, name: str) -> torch.Tensor:
    info = checkpoint.tensors[name]
    dtype = torch_dtype(info.dtype)
    buffer = bytearray(prod(info.shape) * dtype.itemsize)
    checkpoint.read_into(memoryview(buffer), name, (0, info.shape[0]), None)
    return torch.frombuffer(buffer, dtype=dtype).view(info.shape)


def write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write a Hugging Face directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
    return directory

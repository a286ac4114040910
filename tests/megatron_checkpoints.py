"""Megatron checkpoints, written in one process as several ranks would."""

import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_upcycle.checkpoint import MegatronCheckpoint, open_checkpoint
from nemo_upcycle.checkpoint.checks import check_tensors
from nemo_upcycle.families import Architecture, family_of

LAYERS, HIDDEN, FFN, VOCAB = 2, 8, 12, 16
NUMBERS = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": FFN,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 2,
    "seq_length": 32,
    "rotary_base": 500000,
    "layernorm_epsilon": 1e-5,
    "vocab_size": VOCAB,
}

ARGS = {
    **{name: value for name, value in NUMBERS.items() if name != "layernorm_epsilon"},
    "vocab_size": VOCAB - 3,  # what the user typed
    "group_query_attention": True,
    "norm_epsilon": 1e-5,
    "normalization": "RMSNorm",
    "swiglu": True,
    "untie_embeddings_and_output_weights": True,
    "num_experts": None,
}

LAYER = "decoder.layers."

FC1 = LAYER + "mlp.linear_fc1.weight"


def tensors() -> dict[str, torch.Tensor]:
    """Return a dense Llama as Megatron stores it, layers stacked."""
    shapes = {
        "embedding.word_embeddings.weight": (VOCAB, HIDDEN),
        LAYER + "self_attention.linear_qkv.layer_norm_weight": (LAYERS, HIDDEN),
        LAYER + "self_attention.linear_qkv.weight": (LAYERS, 16, HIDDEN),
        LAYER + "self_attention.linear_proj.weight": (LAYERS, HIDDEN, 8),
        LAYER + "mlp.linear_fc1.layer_norm_weight": (LAYERS, HIDDEN),
        FC1: (LAYERS, 2 * FFN, HIDDEN),
        LAYER + "mlp.linear_fc2.weight": (LAYERS, HIDDEN, FFN),
        "decoder.final_layernorm.weight": (HIDDEN,),
        "output_layer.weight": (VOCAB, HIDDEN),
    }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save(directory: Path, stored: dict[str, torch.Tensor], axis: int = -1) -> Path:
    """Write weights as two ranks would, each tensor cut in two across an axis."""
    directory.mkdir(parents=True)
    metadata = Metadata({}, storage_data={})
    for name, values in stored.items():
        chunks = []
        for rank, part in enumerate(values.split(-(-values.shape[axis] // 2), axis)):
            offsets = [0] * values.dim()
            offsets[axis] = rank * part.shape[axis] if rank == 0 else values.shape[axis] // 2
            with open(directory / f"__{rank}_0.distcp", "ab") as file:
                start = file.tell()
                torch.save(part.clone(), file)
                place = _StorageInfo(file.name.rpartition("/")[2], start, file.tell() - start)
            metadata.storage_data[MetadataIndex(name, offsets)] = place
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), part.shape))
        properties = TensorProperties(dtype=values.dtype)
        entry = TensorStorageMetadata(properties, values.shape, chunks)
        metadata.state_dict_metadata[name] = entry
    metadata.state_dict_metadata["decoder.layers.mlp._extra_state/shard_0_2"] = (
        BytesStorageMetadata()
    )
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    torch.save({"args": Namespace(**ARGS), "iteration": 3}, directory / "common.pt")
    return directory


def save_nemo(directory: Path, stored: dict[str, torch.Tensor], **config: Any) -> Path:
    """Write a NeMo 2 checkpoint."""
    save(directory / "weights", {f"module.{name}": values for name, values in stored.items()})
    (directory / "context").mkdir()
    silu = {"_target_": "torch.nn.functional.silu", "_call_": False}
    model = {
        "_target_": "nemo.collections.llm.gpt.model.llama.LlamaModel",
        "config": {**NUMBERS, "activation_func": silu, "params_dtype": None, **config},
    }
    (directory / "context" / "model.yaml").write_text(yaml.safe_dump(model))
    return directory


def read(checkpoint: MegatronCheckpoint, name: str) -> torch.Tensor:
    """Read a whole tensor."""
    info = checkpoint.tensors[name]
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[info.dtype]
    values = torch.zeros(info.shape, dtype=dtype)
    buffer = memoryview(values.view(-1).view(torch.uint8).numpy())
    checkpoint.read_into(buffer, name, (0, info.shape[0]), None)
    return values


def architecture(source: Path) -> Architecture:
    """Open a checkpoint, check all that can be checked without reading weights."""
    checkpoint = open_checkpoint(str(source))
    family = family_of(checkpoint.config)
    arch = family.architecture(checkpoint.config)
    check_tensors(checkpoint.tensors, family, arch, str(source))
    return arch


def change_metadata(directory: Path, change: Callable[[Metadata], object]) -> None:
    """Rewrite `.metadata`."""
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def place(metadata: Metadata, name: str = FC1) -> _StorageInfo:
    """Return where the first chunk of a tensor is."""
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)

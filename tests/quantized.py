"""Tiny FP8 checkpoints, and the weights that they have once dequantized."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nemo_upcycle.checkpoint import DenseCheckpoint
from nemo_upcycle.checkpoint.dtypes import torch_dtype

LARGEST = 448.0
"""The largest number of E4M3."""


def _weights(**args: Any) -> dict[str, Any]:
    """Return a config of compressed-tensors with these arguments of its weights."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, **args}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _fp8(block: list[int] | None, **settings: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "weight_block_size": block, "fmt": "e4m3", **settings}


@dataclass(frozen=True)
class Fp8:
    """A way of storing weights in FP8.

    Attributes:
        config: What config.json says.
        block: Rows and columns that share a scale; 0 for all.
        dtype: dtype of the scales.
        shape: Changes the shape of the scales in the file.
    """

    config: dict[str, Any]
    block: tuple[int, int]
    dtype: torch.dtype = torch.float32
    shape: Callable[[torch.Tensor], torch.Tensor] = lambda scales: scales

    @property
    def suffix(self) -> str:
        """Ending of the scales' names."""
        return "weight_scale_inv" if self.config["quant_method"] == "fp8" else "weight_scale"


BF16 = torch.bfloat16
STATIC = _fp8(None, activation_scheme="static")
FP8: dict[str, Fp8] = {
    "blocks": Fp8(_fp8([16, 16]), (16, 16)),
    "blocks, scales in bf16": Fp8(_fp8([16, 16]), (16, 16), BF16),
    "blocks, scales in powers of two": Fp8(_fp8([16, 16]), (16, 16), torch.float8_e8m0fnu),
    "blocks that do not divide": Fp8(_fp8([24, 40]), (24, 40)),
    "one scale per tensor": Fp8(STATIC, (0, 0), shape=lambda scales: scales.view(())),
    "compressed-tensors, tensor": Fp8(
        _weights(strategy="tensor"), (0, 0), BF16, lambda scales: scales.view(1)
    ),
    "compressed-tensors, channel": Fp8(_weights(strategy="channel"), (1, 0), BF16),
    "compressed-tensors, group": Fp8(_weights(strategy="group", group_size=32), (1, 32)),
    "compressed-tensors, block": Fp8(
        _weights(strategy="block", block_structure=[24, 40]), (24, 40), torch.float16
    ),
    "fbgemm_fp8": Fp8({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, (1, 0)),
}
"""By name: ways of storing weights in FP8."""


def expanded(scales: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """Return a scale for each value."""
    rows = scales.repeat_interleave(block[0] or shape[0], 0)
    return rows.repeat_interleave(block[1] or shape[1], 1)[: shape[0], : shape[1]]


def _largest(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Return the largest magnitude in each block."""
    rows, columns = block[0] or weight.shape[0], block[1] or weight.shape[1]
    parts = [[p.abs().max() for p in strip.split(columns, 1)] for strip in weight.split(rows)]
    return torch.tensor(parts)


def write_fp8(dense: Path, directory: Path, way: str, dtype: torch.dtype = BF16) -> Path:
    """Write a dense model with its linear layers in FP8.

    Args:
        dense: Directory of the model, in fp32 and one file.
        directory: Directory to write.
        way: One of `FP8`.
        dtype: dtype of the other weights, which config.json says.

    Returns:
        Directory of the dequantized model, beside the other.
    """
    kind, plain = FP8[way], directory.with_name(f"{directory.name}-plain")
    for path in (directory, plain):
        shutil.copytree(dense, path)
    stored: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for name, weight in load_file(dense / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = weights[name] = weight.to(dtype)
            continue
        scales = (_largest(weight, kind.block) / LARGEST).to(kind.dtype)
        factors = expanded(scales.float(), kind.block, weight.shape)
        own = f"{name.removesuffix('weight')}{kind.suffix}"
        stored[own] = kind.shape(scales).contiguous()
        stored[name] = (weight / factors).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        product = stored[name].float() * factors
        if kind.config["quant_method"] == "compressed-tensors":
            product = product.to(kind.dtype)
        weights[name] = product.to(dtype)
        if kind.config is STATIC:
            stored[f"{name.removesuffix('weight')}activation_scale"] = torch.tensor(0.5)
    config = json.loads((dense / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    for path, tensors in ((directory, stored), (plain, weights)):
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(
        json.dumps(config | {"quantization_config": kind.config})
    )
    return plain


def read_block(
    checkpoint: DenseCheckpoint,
    name: str,
    rows: tuple[int, int],
    columns: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Read a block of a tensor, as a plan does."""
    info = checkpoint.tensors[name]
    dtype = torch_dtype(info.dtype)
    width = info.width if columns is None else columns[1] - columns[0]
    raw = bytearray((rows[1] - rows[0]) * width * dtype.itemsize)
    checkpoint.read_into(memoryview(raw), name, rows, columns)
    return torch.frombuffer(raw, dtype=dtype).view(-1, width)

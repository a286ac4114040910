"""The supported dtypes: names in safetensors, torch and Hugging Face, and sizes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""torch's and Hugging Face's names, by safetensors'."""

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of a value."""


def dtype_called(name: object) -> str | None:
    """Return safetensors' name of a dtype by torch's or Hugging Face's, None for another dtype."""
    short = str(name).removeprefix("torch.")
    return next((dtype for dtype, known in DTYPE_NAMES.items() if known == short), None)


def torch_dtype(dtype: str) -> "torch.dtype":
    """Return torch's dtype by safetensors' name."""
    import torch  # takes a second, which plans need not

    return getattr(torch, DTYPE_NAMES[dtype])

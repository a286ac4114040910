"""Activation functions that Megatron-Core does not have, importable by name.

NeMo and Megatron record functions by their names.
"""

import torch


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """Compute GELU by tanh, as transformers' `gelu_pytorch_tanh`."""
    return torch.nn.functional.gelu(x, approximate="tanh")

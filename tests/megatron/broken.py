"""Hooks that are broken as a careless one would be; each has to make a test fail."""

from dataclasses import replace
from typing import Any

import torch

Chunks = list[torch.nn.Module]


def other_order(hook: Any) -> Any:
    """Return the virtual stages in another order than Megatron's."""
    return lambda chunks: hook(chunks)[::-1]


def first_stage_alone(hook: Any) -> Any:
    """Fill the first virtual stage and forget the others."""

    def broken(chunks: Chunks) -> Chunks:
        hook(chunks[:1])
        return chunks

    return broken


def no_resume_check(hook: Any) -> Any:
    """Upcycle at every start, without looking for a checkpoint to resume."""
    return replace(hook, run=None)


def unmark_experts(chunks: Chunks) -> Chunks:
    """Leave experts out of the gradient norm of all tensor-parallel ranks but the first."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if ".mlp.experts." in name:
                parameter.tensor_model_parallel = False
    return chunks

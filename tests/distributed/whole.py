"""Whole parameters from the shards of all ranks."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Whole:
    """Whole parameters put together from the shards of all ranks.

    Attributes:
        parameters: By name.
        problems: What is wrong: elements that no rank has, or that two ranks have differently.
    """

    parameters: dict[str, torch.Tensor]
    problems: list[str]


def assemble(shards: Iterable[tuple[Any, torch.Tensor]]) -> Whole:
    """Put shards, each with its values, in their places."""
    parameters: dict[str, torch.Tensor] = {}
    filled: dict[str, torch.Tensor] = {}
    problems = []
    for shard, values in shards:
        if shard.name not in parameters:
            parameters[shard.name] = torch.zeros(shard.global_shape)
            filled[shard.name] = torch.zeros(shard.global_shape, dtype=torch.bool)
        place = tuple(
            slice(start, start + size)
            for start, size in zip(shard.offset, shard.shape, strict=True)
        )
        part, seen = parameters[shard.name][place], filled[shard.name][place]
        if bool((seen & (part != values)).any()):
            problems.append(f"{shard.name} differs between ranks")
        part.copy_(values)
        seen.fill_(True)
    problems += [f"{name} is not whole" for name, mask in filled.items() if not mask.all()]
    return Whole(parameters, problems)


def whole(shards: Iterable[tuple[Any, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Put shards together; every element must be there, and the same wherever it is twice."""
    assembled = assemble(shards)
    assert not assembled.problems
    return assembled.parameters


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Name the parameters that are not bit-identical, or only on one side."""
    both = found.keys() & expected.keys()
    different = {name for name in both if not torch.equal(found[name], expected[name])}
    return sorted(different | (found.keys() ^ expected.keys()))

"""Distance of an upcycled model's weights from the dense weights, read tensor by tensor."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from nemo_upcycle.checkpoint import DenseCheckpoint, Span
from nemo_upcycle.checkpoint.dtypes import torch_dtype
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture, Family
from nemo_upcycle.families.model import MoEModel, upcycling_of
from nemo_upcycle.families.names import is_shared
from nemo_upcycle.plans.rank import Segment, segments
from nemo_upcycle.progress import Progress
from nemo_upcycle.trained.opened import Trained

EXACT = 1e-6
"""Relative distance up to which weights count as equal up to rounding."""


@dataclass
class Drift:
    """Relative distances of weights, each a maximum over tensors.

    Attributes:
        others: Distance of all weights except experts and routers to the dense weights.
        experts: Distance of experts' parts to the nearest multiple of the dense neurons.
        scales: Estimated factors of the parts (gate, up, down, and the shared expert's).
    """

    others: float = 0.0
    experts: float = 0.0
    scales: dict[str, float] = field(default_factory=dict)

    @property
    def untouched(self) -> bool:
        """Whether the weights are exact copies of the dense weights."""
        return max(self.others, self.experts) <= EXACT


def drift(dense: DenseCheckpoint, trained: Trained, progress: Progress | None = None) -> Drift:
    """Compare an upcycled model's weights with the dense weights.

    Args:
        dense: The dense checkpoint.
        trained: The MoE.
        progress: Called with parameters compared and to compare.

    Raises:
        UpcyclingError: The shapes of the two models differ.
    """
    family, arch = dense.family, dense.architecture
    _check_alike(arch, trained.model.arch)
    total = Drift()
    upcycling = upcycling_of(trained.model, arch.ffn_hidden_size)
    pairs = list(_pairs(family, trained.model))

    def missing(tensor: str) -> UpcyclingError:
        return UpcyclingError(
            f"{dense.directory} has no {tensor}. Give the dense checkpoint that the MoE was "
            "upcycled from."
        )

    for done, (pattern, layer, expert, name) in enumerate(pairs, 1):
        neurons = _neurons(name, expert, upcycling, arch.ffn_hidden_size)
        rows = family.parameters[pattern].rows(arch, neurons)
        columns = neurons if family.parameters[pattern].columns_are_neurons else None
        source = segments(rows, dense.tensors, partial(str.format, layer=layer), missing)
        before = _read(dense, source, columns)
        after = _read(trained.checkpoint, trained.segments(name), None)
        if ".experts." in name or is_shared(name):
            _add_expert(total, name, before, after)
        else:
            total.others = max(total.others, _distance(before, after))
        if progress:
            progress(done, len(pairs))
    return total


def _check_alike(dense: Architecture, moe: Architecture) -> None:
    names = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")
    different = [
        f"{name} {getattr(dense, name)} and {getattr(moe, name)}"
        for name in names
        if getattr(dense, name) != getattr(moe, name)
    ]
    if different:
        raise UpcyclingError(
            f"The dense model and the MoE are not of one shape: {', '.join(different)}. "
            "Give the dense checkpoint that the MoE was upcycled from."
        )


def _neurons(
    name: str, expert: int | None, upcycling: UpcyclingConfig, dense_width: int
) -> Span | None:
    """Return the dense neurons of a routed or shared expert; None for another parameter."""
    if expert is not None:
        return upcycling.neurons(expert, dense_width)
    return (0, upcycling.shared_width(dense_width)) if is_shared(name) else None


def _pairs(family: Family, model: MoEModel) -> Iterator[tuple[str, int | None, int | None, str]]:
    """Yield each dense parameter with each derived parameter: pattern, layer, expert, name."""
    for pattern in family.parameters:
        if pattern == "output_layer.weight" and model.arch.share_embeddings_and_output_weights:
            continue
        if "{layer}" not in pattern:
            yield pattern, None, None, pattern
            continue
        for layer, moe in enumerate(model.is_moe):
            name = pattern.format(layer=layer)
            if not moe or ".mlp.linear_fc" not in name or "layer_norm" in name:
                yield pattern, layer, None, name
                continue
            for expert in range(model.num_experts):
                inside = name.replace(".mlp.", f".mlp.experts.{expert}.")
                yield pattern, layer, expert, inside
            if model.has_shared_expert:
                yield pattern, layer, None, name.replace(".mlp.", ".mlp.shared_experts.")


def _read(
    checkpoint: DenseCheckpoint, source: Sequence[Segment], columns: Span | None
) -> torch.Tensor:
    parts = []
    for name, start, stop in source:
        info = checkpoint.tensors[name]
        width = info.width if columns is None else columns[1] - columns[0]
        dtype = torch_dtype(info.dtype)
        buffer = bytearray((stop - start) * width * dtype.itemsize)
        checkpoint.read_into(memoryview(buffer), name, (start, stop), columns)
        parts.append(torch.frombuffer(buffer, dtype=dtype).view(stop - start, width))
    return torch.cat(parts)


def _add_expert(total: Drift, name: str, before: torch.Tensor, after: torch.Tensor) -> None:
    shared = "shared " if is_shared(name) else ""
    parts = [("down", before, after)]
    if "linear_fc1" in name:
        halves = before.chunk(2), after.chunk(2)
        parts = list(zip(("gate", "up"), *halves, strict=True))
    for part, dense, expert in parts:
        numbers = dense.float(), expert.float()
        scale = float((numbers[0] * numbers[1]).sum() / numbers[0].square().sum().clamp(min=1e-30))
        if abs(scale - 1) < 1e-3:
            scale, distance = 1.0, _distance(dense, expert)
        else:
            distance = _distance(dense.float() * scale, expert)
            if distance < torch.finfo(expert.dtype).eps / 2:
                distance = 0.0  # a product is rounded
        total.experts = max(total.experts, distance)
        total.scales[shared + part] = scale


def _distance(before: torch.Tensor, after: torch.Tensor) -> float:
    if before.shape != after.shape:
        raise UpcyclingError(
            f"A weight of the dense model is {list(before.shape)}, in the MoE {list(after.shape)}. "
            "Give the dense checkpoint that the MoE was upcycled from."
        )
    before = before.to(after.dtype).float()
    return float((after.float() - before).norm() / before.norm().clamp(min=1e-30))

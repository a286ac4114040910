"""The declaration of an MoE architecture of transformers: tensors, and their map to Megatron's.

The names of expert tensors are those in files of both transformers 4 and 5.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from nemo_upcycle.families import names
from nemo_upcycle.families.family import Architecture, Family, Neurons, Operation, Rows
from nemo_upcycle.families.llama import MEGATRON_LAYER, MLP
from nemo_upcycle.families.model import MoEModel

EXPERT = MEGATRON_LAYER + "mlp.experts.{expert}."
SHARED = MEGATRON_LAYER + "mlp.shared_experts."
ROUTER = MEGATRON_LAYER + "mlp.router.weight"
EXPERT_BIAS = MEGATRON_LAYER + names.EXPERT_BIAS


@dataclass(frozen=True)
class StackedFC1:
    """The part of expert 0 of a tensor [experts, gate and up, hidden]."""

    columns_are_neurons: ClassVar[bool] = False
    tensor: str

    def rows(self, arch: Architecture, neurons: Neurons | None = None) -> Iterator[Rows]:
        first, last = neurons or (0, arch.ffn_hidden_size)
        for part in range(arch.fc1_rows):
            yield Rows(self.tensor, part * (last - first), (part + 1) * (last - first))


@dataclass(frozen=True)
class StackedFC2:
    """The part of expert 0 of a tensor [experts, hidden, neurons]."""

    columns_are_neurons: ClassVar[bool] = True
    tensor: str

    def rows(self, arch: Architecture, neurons: Neurons | None = None) -> Iterator[Rows]:
        yield Rows(self.tensor, 0, arch.hidden_size)


_STACKED = (StackedFC1, StackedFC2)


@dataclass(frozen=True)
class MoEFamily:
    """An architecture of transformers.

    Attributes:
        model_type: The name in `config.json`.
        class_name: The model's class.
        dense: The dense family that is the same except for the experts.
        parameters: Operations by Megatron parameter, with `{layer}` and `{expert}` for repeated
            ones.
        config: Keys of `config.json` that are specific to this architecture.
        layer_zeros: Tensors of an MoE layer without a counterpart in Megatron; must be 0.
        doubled: Suffix of tensors that are twice Megatron's.
    """

    model_type: str
    class_name: str
    dense: Family
    parameters: Mapping[str, Operation]
    config: Callable[[MoEModel], dict[str, Any]]
    layer_zeros: Callable[[MoEModel], Mapping[str, tuple[int, ...]]] = field(
        default=lambda model: {}
    )
    doubled: str | None = None

    def rows(self, pattern: str, model: MoEModel, expert: int | None) -> Iterator[Rows]:
        """Yield the rows that make up a parameter; in a stacked tensor, experts follow each other.

        Args:
            pattern: The parameter's name, with `{layer}` and `{expert}`.
            model: The model.
            expert: The parameter's expert, None if it has none.
        """
        operation = self.parameters[pattern]
        found = list(operation.rows(model.arch, (0, model.neurons_of(pattern))))
        if not isinstance(operation, _STACKED):
            yield from found
            return
        before = (expert or 0) * max(rows.stop or 0 for rows in found)
        for rows in found:
            yield Rows(rows.tensor, before + rows.start, before + (rows.stop or 0))

    def stack(self, tensor: str, model: MoEModel) -> int:
        """Return the experts that a tensor stacks along its first axis; 1 for other tensors."""
        stacked = (op.tensor for op in self.parameters.values() if isinstance(op, _STACKED))
        ends = tuple(name.partition("{layer}")[2] for name in stacked)
        return model.num_experts if ends and tensor.endswith(ends) else 1

    def shapes(self, model: MoEModel) -> dict[str, tuple[int, ...]]:
        """Return the expected shape of every tensor, layers and experts filled in."""
        moe = [layer for layer, is_moe in enumerate(model.is_moe) if is_moe]
        replaced = tuple(MLP.format(layer=layer) for layer in moe)
        shapes = {
            name: shape
            for name, shape in self.dense.shapes(model.arch).items()
            if not name.startswith(replaced)
        }
        for layer in moe:
            shapes |= self._moe_layer(model, layer)
        return shapes | self.zeros(model)

    def _moe_layer(self, model: MoEModel, layer: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        hidden = model.arch.hidden_size
        for name in self.parameters.keys() - self.dense.parameters.keys():
            if name.startswith(SHARED) and not model.has_shared_expert:
                continue
            if name == EXPERT_BIAS:
                continue
            is_expert = name.startswith(EXPERT)
            columns = model.neurons_of(name) if name.endswith("linear_fc2.weight") else hidden
            for rows in self.rows(name, model, 0 if is_expert else None):
                whole = model.num_experts if name == ROUTER else hidden
                count = (rows.stop or whole) * self.stack(rows.tensor, model)
                for expert in range(model.num_experts if is_expert else 1):
                    tensor = rows.tensor.format(layer=layer, expert=expert)
                    shapes[tensor] = (count, columns)  # of a fused tensor the last rows decide
        if model.has_expert_bias:
            (bias,) = self.parameters[EXPERT_BIAS].rows(model.arch)
            shapes[bias.tensor.format(layer=layer)] = (model.num_experts,)
        return shapes

    def zeros(self, model: MoEModel) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of tensors without a counterpart in Megatron, which must be 0."""
        layers = [layer for layer, moe in enumerate(model.is_moe) if moe]
        shapes = self.layer_zeros(model)
        return {name.format(layer=n): shape for name, shape in shapes.items() for n in layers}

"""A trained model in any format (NeMo 2, Megatron, Hugging Face) under Megatron's names.

The operations of upcycling also describe where the rows of a trained parameter are stored. So a
trained model is exported, imported and loaded under any mapping, slice by slice, without building a
model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from nemo_upcycle.checkpoint import (
    DTYPE_BYTES,
    DenseCheckpoint,
    HuggingFaceCheckpoint,
    MegatronCheckpoint,
    Piece,
    Span,
    TensorInfo,
    is_huggingface,
)
from nemo_upcycle.checkpoint.dtypes import torch_dtype
from nemo_upcycle.checkpoint.kept import kept_in
from nemo_upcycle.checkpoint.megatron import VOCABULARY
from nemo_upcycle.checkpoint.run_directory import resolve_trained
from nemo_upcycle.errors import UpcyclingError, listing
from nemo_upcycle.families.family import Architecture, Rename, Rows
from nemo_upcycle.families.fields import megatron_model
from nemo_upcycle.families.model import MoEModel
from nemo_upcycle.families.moe_config import MOE_FAMILIES, moe_model
from nemo_upcycle.families.moe_family import MoEFamily
from nemo_upcycle.families.names import expert_of, layer_of, pattern_of, stored_name
from nemo_upcycle.plans.rank import Segment, segments


@dataclass(frozen=True)
class Trained:
    """A trained model: an MoE, or a dense model of NeMo 2 or Megatron.

    Attributes:
        checkpoint: The checkpoint with the tensors.
        model: Description of the model.
        family: Architecture of the Hugging Face directory; None for Megatron's own names.
        kept: The run's record of the dense model's configs, see `checkpoint.kept`; None if there
            is none.
    """

    checkpoint: DenseCheckpoint
    model: MoEModel
    family: MoEFamily | None
    kept: Mapping[str, Any] | None = None

    @property
    def dtype(self) -> str:
        """The dtype of the embeddings, by safetensors' name."""
        return self.checkpoint.tensors[self.segments(VOCABULARY[0])[0][0]].dtype

    def segments(self, parameter: str) -> list[Segment]:
        """Return the tensors, with rows, that make up a Megatron parameter.

        Raises:
            UpcyclingError: The checkpoint has nothing for it.
        """
        layer, expert = layer_of(parameter), expert_of(parameter)

        def missing(tensor: str) -> UpcyclingError:
            return UpcyclingError(
                f"{self.checkpoint.directory} has no {tensor}, expected for the model's "
                f"{parameter}. The checkpoint is incomplete, or the config is another model's."
            )

        return segments(
            self._rows(parameter, expert),
            self.checkpoint.tensors,
            lambda tensor: tensor.format(layer=layer, expert=expert),
            missing,
        )

    def _rows(self, parameter: str, expert: int | None) -> Iterator[Rows]:
        name = stored_name(parameter)
        if self.family is None:
            return Rename(name).rows(self.model.arch)
        pattern = pattern_of(name)
        if pattern not in self.family.parameters:
            raise UpcyclingError(
                f"The model has {parameter}, which does not exist in a {self.family.model_type}."
            )
        return self.family.rows(pattern, self.model, expert)

    @cached_property
    def unread(self) -> frozenset[str]:
        """Tensors that must be 0 and have no counterpart in Megatron."""
        return frozenset(self.family.zeros(self.model) if self.family else ())


def open_trained(source: str | Path) -> Trained:
    """Open a trained model by headers.

    Args:
        source: A NeMo 2 or Megatron-LM checkpoint saved under any mapping, dense or MoE; a run's
            directory; or a Hugging Face directory of an MoE.

    Raises:
        UpcyclingError: The source cannot be read, or Megatron cannot compute the model.
    """
    directory = resolve_trained(source)
    if is_huggingface(directory):
        return _open_huggingface(directory)
    checkpoint = MegatronCheckpoint(directory, experts=True)
    kept = kept_in(checkpoint.directory)
    model = megatron_model(checkpoint.config)
    if kept is not None:
        model = replace(model, arch=_with_context(model.arch, kept))
    return Trained(checkpoint, model, None, kept)


def _with_context(arch: Architecture, kept: Mapping[str, Any]) -> Architecture:
    """Return the architecture with the dense model's context length and window.

    The run's config has the length of the training sequences, and a window only if shorter.
    """
    trained_at, window = arch.max_position_embeddings, kept.get("sliding_window")
    if arch.sliding_window is not None or (window is not None and trained_at > window):
        window = arch.sliding_window
    length = max(trained_at, kept["max_position_embeddings"])
    return replace(arch, max_position_embeddings=length, sliding_window=window)


# --- Hugging Face --------------------------------------------------------------------------------


class _HuggingFaceMoE(HuggingFaceCheckpoint):
    """A directory whose tensors are read as Megatron's values.

    Some are stored doubled. Stacked ones have one matrix after another.
    """

    def __init__(self, directory: Path, doubled: str | None) -> None:
        super().__init__(directory)
        self._doubled = doubled

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        return {
            name: replace(info, shape=(prod(info.shape[:-1]), info.shape[-1]))
            if len(info.shape) > 1
            else info
            for name, info in super().tensors.items()
        }

    def pieces(self, name: str) -> tuple[Piece]:
        shape = self.tensors[name].shape
        columns = (0, shape[1]) if len(shape) > 1 else (0, 1)
        return (replace(super().pieces(name)[0], rows=(0, shape[0]), columns=columns),)

    def read_into(self, buffer: memoryview, name: str, rows: Span, columns: Span | None) -> None:
        super().read_into(buffer, name, rows, columns)
        if self._doubled is not None and name.endswith(self._doubled):
            import torch

            torch.frombuffer(buffer, dtype=torch_dtype(self.tensors[name].dtype)).mul_(0.5)


def _open_huggingface(directory: Path) -> Trained:
    opened = open_as_stored(directory)
    assert opened.family is not None
    _check_zeros(opened)
    return replace(opened, checkpoint=_HuggingFaceMoE(directory, opened.family.doubled))


def open_as_stored(directory: Path) -> Trained:
    """Open a Hugging Face directory of an MoE with the values of its files.

    What Megatron cannot compute of a supported family, a gate of the shared expert, is no error.

    Raises:
        UpcyclingError: The directory cannot be read, or is of another family.
    """
    checkpoint = _HuggingFaceMoE(directory, None)
    model = moe_model(checkpoint.config)
    opened = Trained(checkpoint, model, MOE_FAMILIES[checkpoint.config["model_type"]])
    _check_shapes(opened)
    return opened


def _check_shapes(opened: Trained) -> None:
    """Check that shapes match the config: a longer tensor would be read only in part."""
    assert opened.family is not None
    tensors = opened.checkpoint.tensors
    wrong = [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in opened.family.shapes(opened.model).items()
        if name in tensors and tensors[name].shape != shape
    ]
    if wrong:
        raise UpcyclingError(
            f"{opened.checkpoint.directory}: {len(wrong)} tensors of the wrong shape: "
            f"{listing(wrong)}. The config belongs to another model."
        )


def _check_zeros(opened: Trained) -> None:
    """Check that tensors without a counterpart in Megatron are 0."""
    checkpoint, family = opened.checkpoint, opened.family
    assert family is not None
    for name, shape in family.zeros(opened.model).items():
        info = checkpoint.tensors.get(name, TensorInfo((), "F32"))
        if info.shape != shape:
            raise UpcyclingError(
                f"{checkpoint.directory} has {name} {list(info.shape)}; expected {list(shape)}."
            )
        buffer = bytearray(prod(shape) * DTYPE_BYTES[info.dtype])
        if buffer:
            checkpoint.read_into(memoryview(buffer), name, (0, shape[0]), None)
        if any(buffer):
            raise UpcyclingError(
                f"{name} of {checkpoint.directory} is not 0; Megatron's model has no gate of the "
                "shared expert. Only a Qwen2-MoE written by `nemo-upcycle export` can be read."
            )

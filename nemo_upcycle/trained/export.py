"""Write a trained MoE as a Hugging Face directory, tensor by tensor, without building a model.

At most one chunk of a tensor is in memory.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from nemo_upcycle.checkpoint import MegatronCheckpoint
from nemo_upcycle.checkpoint.dtypes import torch_dtype
from nemo_upcycle.checkpoint.tokenizer_files import find_tokenizer
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.model import MoEModel
from nemo_upcycle.families.moe import moe_family_of
from nemo_upcycle.families.moe_family import MoEFamily
from nemo_upcycle.plans.rank import chunk_spans
from nemo_upcycle.progress import Progress, no_progress
from nemo_upcycle.trained.configs import write_configs
from nemo_upcycle.trained.opened import open_trained
from nemo_upcycle.trained.outputs import (
    SHARD_BYTES,
    Output,
    new_directory,
    outputs_of,
    write_tensors,
)


@dataclass(frozen=True)
class Export:
    """The plan of an export.

    Attributes:
        checkpoint: The MoE's checkpoint.
        model: The MoE.
        family: The architecture of transformers.
        outputs: The tensors, by name.
        kept: Settings of the dense model's configs; see `checkpoint.kept`.
        notes: Notes for the user.
    """

    checkpoint: MegatronCheckpoint
    model: MoEModel
    family: MoEFamily
    outputs: Mapping[str, Output]
    kept: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @cached_property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(output.bytes for output in self.outputs.values())

    @property
    def capacity_factor(self) -> float | None:
        """The capacity factor if Megatron may drop tokens, which transformers never does."""
        factor = self.checkpoint.config.get("moe_expert_capacity_factor")
        can_drop = factor is not None and factor * self.model.topk < self.model.num_experts
        return factor if can_drop else None


def plan_export(source: str | Path) -> Export:
    """Plan the export of a trained MoE, reading only headers.

    Args:
        source: A NeMo 2 or Megatron-LM checkpoint of an upcycled model, saved under any mapping,
            or a run's directory, which means the last complete checkpoint.

    Raises:
        UpcyclingError: The source is no such checkpoint, or no architecture of transformers
            computes the model.
    """
    trained = open_trained(source)
    checkpoint, model = trained.checkpoint, trained.model
    if not isinstance(checkpoint, MegatronCheckpoint):
        raise UpcyclingError(
            f"{source} is a Hugging Face directory already; expected a NeMo 2 or Megatron-LM "
            "checkpoint."
        )
    if not any(model.is_moe):
        raise UpcyclingError(
            "The checkpoint is of a dense model; expected an upcycled one. NeMo exports it: "
            "nemo llm export path=… target=hf output_path=…"
        )
    family = moe_family_of(model)
    outputs = outputs_of(checkpoint.tensors, model, family)
    return Export(checkpoint, model, family, outputs, trained.kept)


def export(
    source: str | Path,
    directory: Path,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Export:
    """Write a trained MoE as a directory that transformers loads.

    Args:
        source: As for `plan_export`.
        directory: Output directory; must not exist, and appears only when complete.
        progress: Called with bytes written and bytes to write.
        shard_bytes: Maximum bytes per file.

    Returns:
        The plan that was executed.

    Raises:
        UpcyclingError: There is nothing to export, no architecture fits, or `directory` exists
            or cannot be written. No files are left then.
    """
    plan = plan_export(source)
    with new_directory(directory.expanduser(), plan.bytes) as new:
        # Small files first: errors appear before the weights are written.
        dtype = plan.outputs["model.norm.weight"].info.dtype
        tokenizer = find_tokenizer(plan.checkpoint.directory, plan.checkpoint.context)
        plan.notes.extend(write_configs(plan.model, plan.family, dtype, plan.kept, tokenizer, new))
        chunks = partial(_chunks, plan.checkpoint)
        write_tensors(plan.outputs, chunks, new, progress or no_progress, shard_bytes)
    return plan


def _chunks(checkpoint: MegatronCheckpoint, output: Output) -> Iterator[bytes | bytearray]:
    if not output.parts:
        yield bytes(output.bytes)
        return
    row_bytes = output.bytes // output.info.shape[0]
    for _, part in sorted(output.parts.items()):
        for rows in chunk_spans((part.start, part.start + part.count), row_bytes):
            buffer = bytearray((rows[1] - rows[0]) * row_bytes)
            checkpoint.read_into(memoryview(buffer), part.name, rows, None)
            yield _doubled(buffer, output.info.dtype) if output.doubled else buffer


def _doubled(raw: bytearray, dtype: str) -> bytes:
    import torch

    values = torch.frombuffer(raw, dtype=torch_dtype(dtype)) * 2
    return values.view(torch.uint8).numpy().tobytes()

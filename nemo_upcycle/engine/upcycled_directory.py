"""Upcycle a dense checkpoint straight into a Hugging Face directory, without a model.

The directory's files take the place of a rank's parameters: the same plan, initializers and
operations fill them. So they hold what a run's export would hold before the first step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path

from nemo_upcycle.checkpoint import DTYPE_BYTES, DenseCheckpoint, TensorInfo
from nemo_upcycle.checkpoint.beside import UPCYCLED_FROM
from nemo_upcycle.checkpoint.described import check_whole
from nemo_upcycle.checkpoint.megatron import VOCABULARY
from nemo_upcycle.checkpoint.tokenizer_directory import tokenizer_directory
from nemo_upcycle.config import Exactness, ParallelFolding, UpcyclingConfig
from nemo_upcycle.engine.load import LoadReport, check_all_used, fill_shards
from nemo_upcycle.engine.mapped_files import mapped_files
from nemo_upcycle.engine.provenance import Origin
from nemo_upcycle.engine.upcycling import Prepared, prepare
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.model import MoEModel, upcycled_model
from nemo_upcycle.families.moe import moe_family_of
from nemo_upcycle.families.moe_family import MoEFamily
from nemo_upcycle.families.names import is_expert_bias, stored_name
from nemo_upcycle.plans.layout import shards
from nemo_upcycle.progress import Progress, no_progress
from nemo_upcycle.trained.configs import write_configs
from nemo_upcycle.trained.model_card import hub_name, write_model_card
from nemo_upcycle.trained.outputs import (
    SHARD_BYTES,
    Output,
    check_finite_fp16,
    files_of,
    new_directory,
    outputs_of,
    write_index,
)


@dataclass(frozen=True)
class UpcycledDirectory:
    """The plan of a Hugging Face directory of an upcycled model.

    Attributes:
        prepared: The dense checkpoint, with the upcycling.
        model: The MoE.
        family: The architecture of transformers.
        dtype: dtype of all tensors, by safetensors' name.
        shapes: Shapes of Megatron's parameters, by the names in checkpoints.
        outputs: The tensors, by name.
        notes: Notes for the user.
    """

    prepared: Prepared
    model: MoEModel
    family: MoEFamily
    dtype: str
    shapes: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, Output]
    notes: list[str] = field(default_factory=list)

    @property
    def inputs(self) -> list[Path]:
        """The directories of the dense checkpoints."""
        return [branch.directory for branch in self.prepared.checkpoint.branches]

    @cached_property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(output.bytes for output in self.outputs.values())

    @cached_property
    def parameters(self) -> int:
        """Elements of the model."""
        return sum(map(prod, self.shapes.values()))

    @cached_property
    def active_parameters(self) -> int:
        """Elements used per token."""
        routed = sum(prod(shape) for name, shape in self.shapes.items() if ".experts." in name)
        return self.prepared.upcycling.active_parameters(self.parameters, routed)

    @property
    def exactness(self) -> Exactness:
        """Whether the MoE computes the dense model's function, and why."""
        gated = self.model.arch.gated_linear_unit
        branches = len(self.prepared.checkpoint.branches)
        return self.prepared.upcycling.exactness(gated, branches)


def plan_directory(
    dense_checkpoint: str, upcycling: UpcyclingConfig | None = None, dtype: str | None = None
) -> UpcycledDirectory:
    """Plan a directory by headers and configs alone.

    Args:
        dense_checkpoint: A source for `prepare`.
        upcycling: What the dense feed-forward layers become; None takes `UpcyclingConfig()`.
        dtype: `F32`, `BF16` or `F16`; None takes that of the dense model's embeddings.

    Raises:
        UpcyclingError: The checkpoint cannot be upcycled so, or no architecture of transformers
            computes the result.
    """
    upcycling = upcycling or UpcyclingConfig()
    if upcycling.num_moe_experts is None:
        raise UpcyclingError(
            "num_moe_experts is None, which keeps the dense model; expected 2 experts or more."
        )
    prepared = prepare(dense_checkpoint, upcycling)
    dense = prepared.checkpoint
    check_whole(dense)
    arch = dense.architecture
    model = upcycled_model(arch, upcycling)
    family = moe_family_of(model)
    shapes = {
        stored_name(shard.name): shard.global_shape
        for shard in shards(arch, upcycling, ParallelFolding(), world_size=1, rank=0)
    }
    own = _dtype_of_embeddings(dense)
    dtype = dtype or own
    infos = {
        name: TensorInfo(shape, "F32" if is_expert_bias(name) else dtype)
        for name, shape in shapes.items()
    }
    outputs = outputs_of(infos, model, family)
    notes = []
    if DTYPE_BYTES[dtype] < DTYPE_BYTES[own]:
        notes.append(
            f"weights are rounded from {own} to {dtype}; step 0 is that of rounded weights"
        )
    return UpcycledDirectory(prepared, model, family, dtype, shapes, outputs, notes)


def _dtype_of_embeddings(dense: DenseCheckpoint) -> str:
    rows = next(dense.family.parameters[VOCABULARY[0]].rows(dense.architecture))
    return dense.tensors[rows.tensor].dtype


def upcycle_directory(
    dense_checkpoint: str,
    directory: str | Path,
    upcycling: UpcyclingConfig | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[UpcycledDirectory, LoadReport]:
    """Write a dense checkpoint as an MoE that transformers loads.

    Args:
        dense_checkpoint: A source for `prepare`.
        directory: Output directory; must not exist, and appears only when complete.
        upcycling: What the dense feed-forward layers become; None takes `UpcyclingConfig()`.
        dtype: See `plan_directory`.
        progress: Called with the bytes done and the bytes in total.
        shard_bytes: Maximum bytes per file.

    Returns:
        The plan that was executed, and what was read.

    Raises:
        UpcyclingError: See `plan_directory`; or `directory` exists or cannot be written, or a
            weight is not finite. No files are left then.
    """
    plan = plan_directory(dense_checkpoint, upcycling, dtype)
    directory = Path(directory).expanduser()
    with new_directory(directory, plan.bytes, plan.inputs) as partial:
        # Small files first: errors appear before the weights are written.
        plan.notes.extend(_write_small_files(plan, partial, directory.name))
        report = _write_weights(plan, partial, progress or no_progress, shard_bytes)
    return plan, report


def _write_small_files(plan: UpcycledDirectory, directory: Path, title: str) -> list[str]:
    """Write configs, tokenizer, model card, and what the directory was made of; return notes."""
    prepared = plan.prepared
    branches = plan.inputs
    names = [hub_name(branch) for branch in branches]
    origin = Origin.of("; ".join(names), prepared.fingerprint, prepared.upcycling)
    (directory / UPCYCLED_FROM).write_text(origin.to_json())
    facts = {
        "experts": f"{plan.model.num_experts} per MoE layer, {plan.model.topk} per token "
        f"({prepared.upcycling.label}), by {prepared.upcycling.initializer}",
        "parameters": f"{plan.parameters:,}, {plan.active_parameters:,} per token",
        "step 0": str(plan.exactness),
        "architecture": plan.family.class_name,
    }
    write_model_card(directory, title, dict(zip(names, branches, strict=True)), facts)
    tokenizer = tokenizer_directory(branches[0])
    return write_configs(plan.model, plan.family, plan.dtype, prepared.kept, tokenizer, directory)


def _write_weights(
    plan: UpcycledDirectory, directory: Path, progress: Progress, shard_bytes: int
) -> LoadReport:
    files = files_of(plan.outputs, shard_bytes)
    dense = plan.prepared.checkpoint
    with mapped_files(files, plan.shapes, directory) as mapped:

        def show(done: int, total: int) -> None:
            mapped.release(done)
            progress(done, total)

        report = fill_shards(mapped.owned, dense, plan.prepared.upcycling, show)
        for values in mapped.doubled:
            values.mul_(2)
        if plan.dtype == "F16":
            for own in mapped.owned:
                check_finite_fp16(own.shard.name, own.data)
    check_all_used(dense, [report])
    write_index(files, directory)
    return report

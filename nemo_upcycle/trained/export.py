"""Write a trained MoE as a Hugging Face directory, tensor by tensor, without building a model.

Export applies the operations of upcycling backwards: an operation says which rows of which tensors
make up a Megatron parameter, and so where the parameter's rows go. At most one chunk of a tensor is
in memory.
"""

import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from nemo_upcycle.checkpoint import DTYPE_BYTES, MegatronCheckpoint, TensorInfo
from nemo_upcycle.checkpoint.dtypes import torch_dtype
from nemo_upcycle.errors import UpcyclingError, listing
from nemo_upcycle.families.model import MoEModel
from nemo_upcycle.families.moe import MoEFamily, moe_family_of
from nemo_upcycle.families.names import expert_of, layer_of, pattern_of
from nemo_upcycle.plans.rank import chunk_spans
from nemo_upcycle.progress import Progress, no_progress
from nemo_upcycle.trained.configs import write_configs, write_json
from nemo_upcycle.trained.opened import open_trained

SHARD_BYTES = 5 * 10**9
"""Maximum bytes per output file, as in transformers."""


@dataclass(frozen=True)
class Part:
    """Rows `start` to `start + count` of a Megatron parameter."""

    name: str
    start: int
    count: int


@dataclass
class Output:
    """A tensor to write: parts of Megatron's parameters one after another, or zeros.

    Attributes:
        info: Shape and dtype.
        parts: Parts by the first row that each fills.
        doubled: Whether the values are twice Megatron's.
    """

    info: TensorInfo
    parts: dict[int, Part] = field(default_factory=dict)
    doubled: bool = False

    @property
    def bytes(self) -> int:
        """Its size."""
        return prod(self.info.shape) * DTYPE_BYTES[self.info.dtype]


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
    outputs = dict(sorted(_outputs(checkpoint, model, family)))
    return Export(checkpoint, model, family, outputs, trained.kept)


def _outputs(
    checkpoint: MegatronCheckpoint, model: MoEModel, family: MoEFamily
) -> Iterator[tuple[str, Output]]:
    outputs: dict[str, Output] = {}
    unknown = []
    for name, info in checkpoint.tensors.items():
        operation = family.parameters.get(pattern_of(name))
        if operation is None:
            unknown.append(name)
            continue
        numbers = {"layer": layer_of(name), "expert": expert_of(name)}
        width = model.expert_width if numbers["expert"] is not None else model.arch.ffn_hidden_size
        position = 0
        for rows in operation.rows(model.arch, (0, width)):
            start, stop = rows.span(info.shape[0])
            count = stop - start
            tensor = rows.tensor.format(**numbers)
            output = outputs.setdefault(
                tensor, Output(TensorInfo((0, *info.shape[1:]), info.dtype))
            )
            output.parts[start] = Part(name, position, count)
            end = max(output.info.shape[0], stop)
            output.info = TensorInfo((end, *info.shape[1:]), info.dtype)
            output.doubled = family.doubled is not None and tensor.endswith(family.doubled)
            position += count
        if position != info.shape[0]:
            raise UpcyclingError(
                f"{name} has {info.shape[0]} rows; its config makes {position} of it. "
                "The checkpoint and its context do not belong together."
            )
    if unknown:
        raise UpcyclingError(
            f"{family.class_name} has nothing for {len(unknown)} tensors: {listing(unknown)}."
        )
    dtype = checkpoint.tensors["decoder.final_layernorm.weight"].dtype
    for name, shape in family.zeros(model).items():
        outputs[name] = Output(TensorInfo(shape, dtype))
    _check_all_there(outputs, family, model)
    _check_whole(outputs)
    yield from outputs.items()


def _check_all_there(outputs: Mapping[str, Output], family: MoEFamily, model: MoEModel) -> None:
    """Check that no tensor of the architecture is missing."""
    missing = sorted(family.shapes(model).keys() - outputs.keys())
    if missing:
        raise UpcyclingError(
            f"The checkpoint has nothing for {len(missing)} tensors of a {family.class_name}: "
            f"{listing(missing)}. The checkpoint is incomplete, or its config is another model's."
        )


def _check_whole(outputs: Mapping[str, Output]) -> None:
    """Check that every row of every tensor has exactly one source."""
    wrong = []
    for name, output in outputs.items():
        position = 0
        for start, part in sorted(output.parts.items()):
            position = position + part.count if start == position else -1
        if output.parts and position != output.info.shape[0]:
            wrong.append(name)
    if wrong:
        raise UpcyclingError(
            f"The checkpoint does not make up {len(wrong)} tensors: {listing(wrong)}. "
            "The checkpoint and its context do not belong together."
        )


# --- Writing -------------------------------------------------------------------------------------


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
    directory = directory.expanduser()
    if directory.exists() or directory.is_symlink():
        raise UpcyclingError(f"{directory} exists; expected a new directory. Give another name.")
    try:
        with _made_whole(directory) as partial:
            # Small files first: errors appear before the weights are written.
            dtype = plan.outputs["model.norm.weight"].info.dtype
            plan.notes.extend(
                write_configs(plan.checkpoint, plan.model, plan.family, dtype, plan.kept, partial)
            )
            _write_tensors(plan, partial, progress or no_progress, shard_bytes)
    except OSError as error:
        raise UpcyclingError(
            f"{directory} cannot be written: {error.strerror or error}. Name a directory that may "
            f"be written, on a disk with {plan.bytes / 2**30:.1f} GiB free."
        ) from error
    return plan


@contextmanager
def _made_whole(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory that is renamed at the end, or removed after an error."""
    partial = directory.with_name(directory.name + ".partial")
    made = [parent for parent in partial.parents if not parent.exists()]
    try:
        if partial.exists():  # left by a killed export
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def _write_tensors(plan: Export, directory: Path, progress: Progress, shard_bytes: int) -> None:
    files: list[dict[str, Output]] = [{}]
    size = 0
    for name, output in plan.outputs.items():
        if files[-1] and size + output.bytes > shard_bytes:
            files.append({})
            size = 0
        files[-1][name] = output
        size += output.bytes
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    done = 0
    for file, outputs in zip(names, files, strict=True):
        for written in _write_file(plan, directory / file, outputs):
            done += written
            progress(done, plan.bytes)
    if len(files) > 1:
        places = {name: file for file, o in zip(names, files, strict=True) for name in o}
        index = {"metadata": {"total_size": plan.bytes}, "weight_map": places}
        write_json(directory / "model.safetensors.index.json", index)


def _write_file(plan: Export, path: Path, outputs: Mapping[str, Output]) -> Iterator[int]:
    """Write a safetensors file: length of the header, header, tensors; yield bytes written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, output in outputs.items():
        header[name] = {
            "dtype": output.info.dtype,
            "shape": list(output.info.shape),
            "data_offsets": [position, position + output.bytes],
        }
        position += output.bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for output in outputs.values():
            for chunk in _chunks(plan.checkpoint, output):
                file.write(chunk)
                yield len(chunk)


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

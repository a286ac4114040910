"""The files of a Hugging Face directory of an MoE: which tensor holds which rows of the model.

The operations of upcycling say which rows of which tensors make up a Megatron parameter. Read
backwards, the operations say where the parameter's rows go.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_upcycle.checkpoint import TensorInfo
from nemo_upcycle.checkpoint.safetensors_header import header_of
from nemo_upcycle.errors import UpcyclingError, listing
from nemo_upcycle.families.model import MoEModel
from nemo_upcycle.families.moe_family import MoEFamily
from nemo_upcycle.families.names import expert_of, layer_of, pattern_of
from nemo_upcycle.files import whole_directory
from nemo_upcycle.progress import Progress, size
from nemo_upcycle.trained.configs import write_json

if TYPE_CHECKING:
    import torch

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
        stack: Matrices, one after another, that are the first axis of the stored shape; 1 for none.
    """

    info: TensorInfo
    parts: dict[int, Part] = field(default_factory=dict)
    doubled: bool = False
    stack: int = 1

    @property
    def stored(self) -> TensorInfo:
        """The tensor as the file describes it."""
        if self.stack == 1:
            return self.info
        rows, *columns = self.info.shape
        return replace(self.info, shape=(self.stack, rows // self.stack, *columns))

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.info.bytes


def outputs_of(
    tensors: Mapping[str, TensorInfo], model: MoEModel, family: MoEFamily
) -> dict[str, Output]:
    """Return the tensors that an MoE's parameters make up, by name, sorted.

    Args:
        tensors: Whole parameters, by Megatron's names with layer and expert filled in.
        model: The MoE.
        family: The architecture of transformers.

    Raises:
        UpcyclingError: Parameters are missing or unknown, or do not fit the model.
    """
    outputs: dict[str, Output] = {}
    unknown = []
    for name, info in tensors.items():
        if pattern_of(name) in family.parameters:
            _add(outputs, name, info, model, family)
        else:
            unknown.append(name)
    if unknown:
        raise UpcyclingError(
            f"{family.class_name} has nothing for {len(unknown)} tensors: {listing(unknown)}."
        )
    dtype = tensors["decoder.final_layernorm.weight"].dtype
    for name, shape in family.zeros(model).items():
        outputs[name] = Output(TensorInfo(shape, dtype))
    _check_all_there(outputs, family, model)
    _check_whole(outputs)
    return dict(sorted(outputs.items()))


def _add(
    outputs: dict[str, Output], name: str, info: TensorInfo, model: MoEModel, family: MoEFamily
) -> None:
    """Add a parameter's rows to the tensors that hold them."""
    numbers = {"layer": layer_of(name), "expert": expert_of(name)}
    position = 0
    for rows in family.rows(pattern_of(name), model, numbers["expert"]):
        start, stop = rows.span(info.shape[0])
        count = stop - start
        tensor = rows.tensor.format(**numbers)
        output = outputs.setdefault(tensor, Output(TensorInfo((0, *info.shape[1:]), info.dtype)))
        output.parts[start] = Part(name, position, count)
        end = max(output.info.shape[0], stop)
        output.info = TensorInfo((end, *info.shape[1:]), info.dtype)
        output.stack = family.stack(tensor, model)
        output.doubled = family.doubled is not None and tensor.endswith(family.doubled)
        position += count
    if position != info.shape[0]:
        raise UpcyclingError(
            f"{name} has {info.shape[0]} rows; its config makes {position} of it. "
            "The checkpoint and its context do not belong together."
        )


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


# --- Files ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file: length of the header, header, tensors.

    Attributes:
        name: The file's name.
        outputs: The tensors, in the file's order.
    """

    name: str
    outputs: Mapping[str, Output]

    @cached_property
    def head(self) -> bytes:
        """What stands before the tensors."""
        infos = {name: output.stored for name, output in self.outputs.items()}
        return header_of(infos, {"format": "pt"})


def files_of(outputs: Mapping[str, Output], shard_bytes: int) -> list[OutputFile]:
    """Divide tensors among files, with the names that transformers gives.

    Args:
        outputs: All tensors.
        shard_bytes: Maximum bytes per file, unless one tensor has more.
    """
    files: list[dict[str, Output]] = [{}]
    size = 0
    for name, output in outputs.items():
        if files[-1] and size + output.bytes > shard_bytes:
            files.append({})
            size = 0
        files[-1][name] = output
        size += output.bytes
    if len(files) == 1:
        return [OutputFile("model.safetensors", files[0])]
    count = len(files)
    return [
        OutputFile(f"model-{number:05}-of-{count:05}.safetensors", held)
        for number, held in enumerate(files, start=1)
    ]


def write_index(files: Sequence[OutputFile], directory: Path) -> None:
    """Write the index that says which file holds a tensor, if there are several files."""
    if len(files) > 1:
        places = {name: file.name for file in files for name in file.outputs}
        total = sum(output.bytes for file in files for output in file.outputs.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(directory / "model.safetensors.index.json", index)


def write_tensors(
    outputs: Mapping[str, Output],
    chunks: Callable[[Output], Iterable[bytes | bytearray]],
    directory: Path,
    progress: Progress,
    shard_bytes: int,
) -> None:
    """Write tensors chunk by chunk.

    Args:
        outputs: All tensors, by name.
        chunks: Yields a tensor's bytes in order.
        directory: Where the files are written.
        progress: Called with bytes written and bytes to write.
        shard_bytes: See `files_of`.
    """
    files = files_of(outputs, shard_bytes)
    done, total = 0, sum(output.bytes for output in outputs.values())
    for described in files:
        with (directory / described.name).open("wb") as file:
            file.write(described.head)
            for output in described.outputs.values():
                for chunk in chunks(output):
                    file.write(chunk)
                    done += len(chunk)
                    progress(done, total)
    write_index(files, directory)


def check_finite_fp16(name: str, values: "torch.Tensor") -> None:
    """Check that no value has overflowed: fp16 ends at 65504.

    Raises:
        UpcyclingError: A value is infinite.
    """
    if not values.isfinite().all():
        raise UpcyclingError(
            f"{name} has values beyond 65504, which fp16 cannot hold. Give --dtype bf16 or fp32."
        )


@contextmanager
def new_directory(
    directory: Path, bytes_written: int, inputs: Iterable[Path] = ()
) -> Iterator[Path]:
    """Yield a temporary directory that gets its name when complete, or is removed after an error.

    Args:
        directory: The directory to make.
        bytes_written: Bytes that will be written.
        inputs: Directories that are read.

    Raises:
        UpcyclingError: `directory` exists, lies in an input, or cannot be written.
    """
    check_new(directory, inputs)
    try:
        with whole_directory(directory) as partial:
            yield partial
    except OSError as error:
        raise UpcyclingError(
            f"{directory} cannot be written: {error.strerror or error}. Name a directory that may "
            f"be written, on a disk with {size(bytes_written)} free."
        ) from error


def check_new(directory: Path, inputs: Iterable[Path] = ()) -> None:
    """Check that a directory is to be made, and outside of what is read.

    Args:
        directory: The directory to make.
        inputs: Directories that are read.

    Raises:
        UpcyclingError: `directory` exists, or lies in an input.
    """
    if directory.exists() or directory.is_symlink():
        raise UpcyclingError(f"{directory} exists; expected a new directory. Give another name.")
    for given in inputs:
        if given.resolve() in directory.resolve().parents:
            raise UpcyclingError(
                f"{directory} lies in the input {given}; expected a directory outside of it."
            )

"""FP8 weights and their scales: which scale belongs to which weight, and weights times scales.

A weight is multiplied by its scales as transformers 5 does when it dequantizes, and rounded to the
model's dtype: in fp32 for `fp8`, and here for `fbgemm_fp8`, which transformers does not dequantize;
in the dtype of the scales for `compressed-tensors`. The files alone say which weights are scaled,
as in transformers; lists of ignored modules are not read. A strip of rows, and the scales of the
rows that are read, are in memory at a time.

Sources: `Fp8Dequantize` and `CompressedTensorsDequantize` of transformers 5; `dequantize` of
compressed-tensors 0.20. A block at the edge may be smaller, as in `FP8Linear` of transformers.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from nemo_upcycle.checkpoint.dense import STRIP, DenseCheckpoint, Entry, Piece, Span, TensorInfo
from nemo_upcycle.checkpoint.dtypes import torch_dtype
from nemo_upcycle.errors import UpcyclingError

if TYPE_CHECKING:  # plans need neither numpy nor torch
    import numpy as np

WEIGHT = "F8_E4M3"
"""safetensors' name of the weights' dtype."""

SCALE_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E8M0": 1}
"""Bytes of a scale, by dtype. E8M0 is a power of two."""

_UNUSED = re.compile(r"\.(input_scale|input_scale_ub|activation_scale|output_scale|[qkv]_scale)$")
"""Scales of activations and of the cache, which the dequantized model has no use for."""


@dataclass(frozen=True)
class ScaledWeight:
    """An FP8 weight with its scales.

    Attributes:
        weight: The weight's place.
        scales: The scales' place.
        scale_dtype: safetensors' name of the scales' dtype.
        grid: Rows and columns of the scales.
        block: Rows and columns of the weight that share a scale.
        dtype: The dtype of the dequantized weight, by safetensors' name.
        product: The dtype to which weight times scale is rounded first.
    """

    weight: Piece
    scales: Piece
    scale_dtype: str
    grid: tuple[int, int]
    block: tuple[int, int]
    dtype: str
    product: str

    def read_into(
        self, checkpoint: DenseCheckpoint, buffer: memoryview, rows: Span, columns: Span
    ) -> None:
        """Read and dequantize a block; see `DenseCheckpoint.read_into`."""
        import numpy as np
        import torch

        width, product = columns[1] - columns[0], torch_dtype(self.product)
        grid, first = self._grid(checkpoint, rows, columns)
        of_column = np.arange(*columns) // self.block[1] - columns[0] // self.block[1]
        target = torch.frombuffer(buffer, dtype=torch_dtype(self.dtype)).view(-1, width)
        step = max(1, STRIP // width)
        raw = np.empty((min(step, rows[1] - rows[0]), width), np.uint8)
        for start in range(*rows, step):
            stop = min(start + step, rows[1])
            strip = raw[: stop - start]
            checkpoint.read_stored(strip.data.cast("B"), (self.weight,), 1, (start, stop), columns)
            values = _numbers()[strip]
            of_row = np.arange(start, stop) // self.block[0] - first
            for row in np.unique(of_row):
                values[of_row == row] *= grid[row, of_column]
            done = torch.from_numpy(values).to(product)
            target[start - rows[0] : stop - rows[0]] = done

    def _grid(
        self, checkpoint: DenseCheckpoint, rows: Span, columns: Span
    ) -> "tuple[np.ndarray[Any, Any], int]":
        """Return the scales of a block, [rows, columns] of the grid, and the first row's number."""
        import torch

        high = rows[0] // self.block[0], -(-rows[1] // self.block[0])
        wide = columns[0] // self.block[1], -(-columns[1] // self.block[1])
        shape = high[1] - high[0], wide[1] - wide[0]
        size = SCALE_BYTES[self.scale_dtype]
        raw = bytearray(shape[0] * shape[1] * size)
        checkpoint.read_stored(memoryview(raw), (self.scales,), size, high, wide)
        e8m0 = self.scale_dtype == "F8_E8M0"
        dtype = torch.float8_e8m0fnu if e8m0 else torch_dtype(self.scale_dtype)
        return torch.frombuffer(raw, dtype=dtype).view(shape).float().numpy(), high[0]


@cache
def _numbers() -> "np.ndarray[Any, Any]":
    """Return the 256 numbers of E4M3 in fp32."""
    import torch

    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


Blocks = Callable[[str, tuple[int, ...]], tuple[int, int] | None]
"""The rows and columns that share a scale, by a weight's name and shape; None if not in FP8."""


@dataclass(frozen=True)
class Scheme:
    """How a quantization method stores FP8 weights.

    Attributes:
        suffix: Ending of the scales' names, after the module's name.
        blocks: Which part of a weight shares a scale.
        in_scale_dtype: Whether the product is rounded to the scales' dtype first.
    """

    suffix: str
    blocks: Blocks
    in_scale_dtype: bool = False


def scheme_of(method: str, settings: Mapping[str, Any]) -> Scheme | None:
    """Return how a quantization config says that FP8 weights are stored.

    Args:
        method: The config's `quant_method`.
        settings: The config.

    Returns:
        The scheme; None if the method does not store weights in FP8.

    Raises:
        ValueError: The config is not one of the method.
    """
    if method == "fp8":
        size = settings.get("weight_block_size", [128, 128])
        block = None if size is None else _pair(size)
        return Scheme("weight_scale_inv", lambda _, shape: block or _whole(shape))
    if method == "fbgemm_fp8":
        return Scheme("weight_scale", lambda _, shape: (1, shape[1]))
    if method == "compressed-tensors":
        groups = [_group(group) for group in (settings.get("config_groups") or {}).values()]
        return Scheme("weight_scale", lambda *weight: _of_groups(groups, *weight), True)
    return None


def _whole(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], shape[1]


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, str):
        value = [int(part) for part in value.split("x")]
    rows, columns = value
    if not all(type(size) is int and size > 0 for size in (rows, columns)):
        raise ValueError(f"blocks of {value}")
    return rows, columns


_Group = tuple[list["str | re.Pattern[str]"], Blocks]


def _group(group: Mapping[str, Any]) -> _Group:
    """Return the targets of a group of compressed-tensors, and its blocks."""
    targets = [re.compile(t[3:]) if t.startswith("re:") else t for t in group["targets"]]
    weights = group.get("weights") or {}
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "tensor" if size is None else "group" if size > 0 else "channel"
    eight = weights.get("type") == "float" and weights.get("num_bits", 8) == 8
    if not eight or not weights.get("symmetric", True):
        return targets, lambda *_: None
    if strategy == "block":
        block = _pair(weights["block_structure"])
        return targets, lambda *_: block
    if strategy == "group":
        row = _pair([1, size])
        return targets, lambda *_: row
    if strategy == "channel":
        return targets, lambda _, shape: (1, shape[1])
    if strategy == "tensor":
        return targets, lambda _, shape: _whole(shape)
    raise ValueError(f"strategy {strategy!r}")


def _of_groups(
    groups: Iterable[_Group], name: str, shape: tuple[int, ...]
) -> tuple[int, int] | None:
    module = name.removesuffix(".weight")
    for targets, blocks in groups:
        if any(_is_target(target, module) for target in targets):
            return blocks(name, shape)
    return None


def _is_target(target: "str | re.Pattern[str]", module: str) -> bool:
    """Return whether a target of compressed-tensors means a linear layer."""
    if isinstance(target, str):
        return target in ("Linear", module)
    return target.match(module) is not None


def scaled_weights(
    entries: Mapping[str, Entry], scheme: Scheme, dtype: str, where: str
) -> tuple[dict[str, Entry], dict[str, ScaledWeight]]:
    """Return the tensors of the dequantized model.

    Args:
        entries: The stored tensors.
        scheme: How weights and scales are stored.
        dtype: dtype of the dequantized weights, by safetensors' name.
        where: Name of the checkpoint, for errors.

    Returns:
        The tensors without scales, with dequantized weights in `dtype`; and the scaled weights.

    Raises:
        UpcyclingError: A weight without scales, scales without a weight, or scales that do not fit.
    """
    scales = {n: e for n, e in entries.items() if n.endswith(f".{scheme.suffix}")}
    tensors: dict[str, Entry] = {}
    scaled: dict[str, ScaledWeight] = {}
    for name, entry in entries.items():
        if name in scales or _UNUSED.search(name):
            continue
        tensors[name] = entry
        if entry[0].dtype == WEIGHT:
            own = f"{name.removesuffix('.weight')}.{scheme.suffix}"
            if own not in scales:
                raise _apart(where, f"{name} is in FP8 and has no {own}")
            scaled[name] = _scaled(name, entry, own, scales.pop(own), scheme, dtype, where)
            tensors[name] = TensorInfo(entry[0].shape, dtype, packed=(1, 1)), entry[1]
    if scales:
        kinds = {name: _kind(entries, name, scheme.suffix) for name in sorted(scales)[:3]}
        raise _apart(where, "; ".join(f"{name} scales {kind}" for name, kind in kinds.items()))
    return tensors, scaled


def _kind(entries: Mapping[str, Entry], scale: str, suffix: str) -> str:
    weight = f"{scale.removesuffix(suffix)}weight"
    return f"a weight in {entries[weight][0].dtype}" if weight in entries else "nothing"


def _scaled(
    name: str, weight: Entry, own: str, scales: Entry, scheme: Scheme, dtype: str, where: str
) -> ScaledWeight:
    (info, piece), (scale_info, scale_piece) = weight, scales
    if len(info.shape) != 2:
        raise _apart(where, f"{name} in FP8 is {list(info.shape)}")
    if scale_info.dtype not in SCALE_BYTES:
        raise _apart(where, f"{own} is in {scale_info.dtype}, not {', '.join(SCALE_BYTES)}")
    block = scheme.blocks(name, info.shape)
    if block is None:
        raise _apart(where, f"{name} is in FP8, and no config group says how")
    grid = -(-info.shape[0] // block[0]), -(-info.shape[1] // block[1])
    shape = scale_info.shape
    if shape != grid and not (grid == (1, 1) and shape in ((), (1,))):
        raise _apart(where, f"{own} is {list(shape)}, for blocks of {block} expected {list(grid)}")
    return ScaledWeight(
        piece,
        Piece(scale_piece.file, scale_piece.start, (0, grid[0]), (0, grid[1])),
        scale_info.dtype,
        grid,
        block,
        dtype,
        scale_info.dtype if scheme.in_scale_dtype and scale_info.dtype != "F8_E8M0" else "F32",
    )


def _apart(where: str, what: str) -> UpcyclingError:
    return UpcyclingError(
        f"The FP8 weights and scales of {where} do not belong together: {what}. Get the checkpoint "
        "again with the config.json that belongs to it, or give the original one in BF16."
    )

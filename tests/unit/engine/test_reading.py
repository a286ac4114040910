"""Blocks are read by slice, whatever the slice, and nothing but them."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_upcycle.checkpoint import HuggingFaceCheckpoint
from nemo_upcycle.checkpoint.dtypes import DTYPE_NAMES, torch_dtype
from nemo_upcycle.engine.reading import Chunk, all_finite, copy_blocks
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.plans.rank import Block

CPU = torch.device("cpu")


def read_all(checkpoint: HuggingFaceCheckpoint, *blocks: Block) -> list[tuple[Chunk, torch.Tensor]]:
    """Read blocks; return their chunks in order, with what was written for each."""
    written: dict[Chunk, torch.Tensor] = {}

    def write(chunk: Chunk, values: torch.Tensor) -> None:
        assert chunk not in written
        written[chunk] = values.clone()

    return [(chunk, written[chunk]) for chunk in copy_blocks(checkpoint, blocks, CPU, {}, write)]


def read(checkpoint: HuggingFaceCheckpoint, block: Block) -> torch.Tensor:
    return torch.cat([values for _, values in read_all(checkpoint, block)])


@pytest.mark.parametrize("chunk_bytes", [1, 1000, 2**20])
def test_any_block_is_the_tensor_there(
    dense: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr("nemo_upcycle.plans.rank.CHUNK_BYTES", chunk_bytes)
    generator = random.Random(0)
    tensors = load_file(dense / "model.safetensors")
    checkpoint = HuggingFaceCheckpoint(dense)
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.3.mlp.down_proj.weight"):
        rows, columns = tensors[name].shape
        for _ in range(20):
            start, first = generator.randrange(rows), generator.randrange(columns)
            stop = generator.randrange(start, rows) + 1
            last = generator.randrange(first, columns) + 1
            found = read(checkpoint, Block(name, (start, stop), (first, last)))
            assert found.equal(tensors[name][start:stop, first:last])
    assert read(checkpoint, Block("model.norm.weight", (5, 9), None)).equal(
        tensors["model.norm.weight"][5:9]
    )


def test_only_the_blocks_bytes_are_read(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    read_run = HuggingFaceCheckpoint._read_run

    def recorded(self: HuggingFaceCheckpoint, file: str, start: int, buffer: memoryview) -> None:
        runs.append(len(buffer))
        read_run(self, file, start, buffer)

    monkeypatch.setattr(HuggingFaceCheckpoint, "_read_run", recorded)
    checkpoint = HuggingFaceCheckpoint(dense)
    name = "model.layers.1.mlp.down_proj.weight"  # 64 rows of 96 columns in fp32
    read(checkpoint, Block(name, (10, 20), (0, 96)))
    assert runs == [10 * 96 * 4]
    runs.clear()
    read(checkpoint, Block(name, (10, 20), (48, 96)))
    assert runs == [48 * 4] * 10


def test_several_blocks_come_in_their_order(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_upcycle.plans.rank.CHUNK_BYTES", 64 * 4 * 5)
    blocks = [Block(f"model.layers.{i}.self_attn.k_proj.weight", (0, 32), (0, 64)) for i in (3, 0)]
    tensors = load_file(dense / "model.safetensors")
    seen = []
    for chunk, values in read_all(HuggingFaceCheckpoint(dense), *blocks):
        seen.append((chunk.block.tensor, chunk.first))
        assert values.equal(tensors[chunk.block.tensor][slice(*chunk.rows)])
    assert seen == [(block.tensor, row) for block in blocks for row in range(0, 32, 5)]


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_finite_is_what_torch_says(dtype: str) -> None:
    limits = torch.finfo(torch_dtype(dtype))
    finite = [0.0, -0.0, 1.0, -1.0, limits.max, limits.min, limits.tiny, limits.tiny / 2]
    for value in (float("nan"), -float("nan"), float("inf"), -float("inf"), *finite):
        values = torch.tensor([1.0, -2.0, value, 3.0], dtype=torch_dtype(dtype))
        raw = values.view(torch.uint8).numpy()
        assert all_finite(raw, dtype) == bool(torch.isfinite(values).all()), value


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_finite_for_every_half(dtype: str) -> None:
    every = torch.from_numpy(np.arange(2**16, dtype=np.uint16).view(np.int16).copy())
    values = every.view(torch_dtype(dtype))
    found = [all_finite(value.view(torch.uint8).numpy(), dtype) for value in values.split(1)]
    assert found == torch.isfinite(values).tolist()


def test_not_finite_names_tensor_and_rows(tmp_path: Path) -> None:
    values = torch.zeros(64, 8)
    values[37, 3] = float("-inf")
    save_file({"w": values}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UpcyclingError, match=r"Tensor w of .* holds NaN or Inf in rows 0:64"):
        read(HuggingFaceCheckpoint(tmp_path), Block("w", (0, 64), (0, 8)))
    assert read(HuggingFaceCheckpoint(tmp_path), Block("w", (0, 37), (0, 8))).eq(0).all()


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(64, 8)}, path)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    assert checkpoint.tensors["w"].shape == (64, 8)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with pytest.raises(UpcyclingError, match=r"ends at byte \d+; the header promises more"):
        read(checkpoint, Block("w", (0, 64), (0, 8)))

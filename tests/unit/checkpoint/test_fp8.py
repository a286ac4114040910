"""FP8 checkpoints are their dequantized weights, bit by bit, whatever part is read."""

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_upcycle import UpcyclingConfig, upcycle_directory
from nemo_upcycle.checkpoint import HuggingFaceCheckpoint, open_checkpoint
from nemo_upcycle.checkpoint.described import open_dense
from nemo_upcycle.checkpoint.fingerprint import fingerprint
from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.plans.job import plan_job
from tests.quantized import FP8, read_block, write_fp8
from tests.tiny import write_dense

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("way", FP8)
def test_every_part_is_the_dequantized_weights(
    dense: Path, tmp_path: Path, way: str, dtype: torch.dtype
) -> None:
    plain = write_fp8(dense, tmp_path / "fp8", way, dtype)
    checkpoint, expected = HuggingFaceCheckpoint(tmp_path / "fp8"), HuggingFaceCheckpoint(plain)
    assert len(checkpoint.scaled) == 7 * 4
    found, whole = checkpoint.tensors, load_file(plain / "model.safetensors")
    assert {n: (i.shape, i.dtype) for n, i in found.items()} == {
        n: (i.shape, i.dtype) for n, i in expected.tensors.items()
    }
    for name, info in found.items():
        if len(info.shape) == 2:
            rows, columns = info.shape
            for low, high, span in (
                (0, rows, None),
                (rows - 1, rows, (0, 1)),
                (15, rows - 5, (7, columns - 3)),
            ):
                part = whole[name][low:high, slice(*(span or (0, columns)))]
                assert torch.equal(read_block(checkpoint, name, (low, high), span), part), name


@pytest.mark.parametrize("way", FP8)
def test_the_moe_is_that_of_the_dequantized_model(dense: Path, tmp_path: Path, way: str) -> None:
    """What ignores a scale, or rounds elsewhere, writes other bytes."""
    plain = write_fp8(dense, tmp_path / "fp8", way)
    upcycling = UpcyclingConfig(num_moe_experts=4, initializer="drop(ratio=0.3)")
    for name in ("fp8", plain.name):
        upcycle_directory(str(tmp_path / name), tmp_path / f"moe-{name}", upcycling)
    one, other = (tmp_path / f"moe-{name}" for name in ("fp8", plain.name))
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        assert (one / file).read_bytes() == (other / file).read_bytes()
    assert "quantization" not in (one / "config.json").read_text()


def test_a_dequantized_copy_is_the_same_dense_model(dense: Path, tmp_path: Path) -> None:
    """A run that began from one may go on with the other; without scales it would not."""
    plain = write_fp8(dense, tmp_path / "fp8", "blocks")
    fp8 = open_checkpoint(str(tmp_path / "fp8"))
    assert fingerprint(fp8) == fingerprint(open_checkpoint(str(plain)))


def test_several_fp8_models_are_averaged_dequantized(tmp_path: Path) -> None:
    names = []
    for seed in (0, 1):
        dense = write_dense(tmp_path / f"dense{seed}", "llama", seed=seed)
        names.append(
            (tmp_path / f"fp8-{seed}", write_fp8(dense, tmp_path / f"fp8-{seed}", "blocks"))
        )
    upcycling = UpcyclingConfig(num_moe_experts=4)
    for i, out in enumerate(("fp8", "plain")):
        source = "; ".join(str(pair[i]) for pair in names)
        upcycle_directory(source, tmp_path / out, upcycling)
    one, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("fp8", "plain"))
    assert one == other


def test_the_plan_counts_the_bytes_of_the_files(dense: Path, tmp_path: Path) -> None:
    write_fp8(dense, tmp_path / "fp8", "blocks")
    fp8 = open_dense(str(tmp_path / "fp8"))
    file = load_file(tmp_path / "fp8" / "model.safetensors")
    stored = sum(t.nbytes for name, t in file.items() if "scale" not in name)
    job = plan_job(fp8, UpcyclingConfig(num_moe_experts=4), ParallelFolding(), 1, 1)
    assert fp8.bytes == job.bytes_to_read == job.bytes_read_once == job.bytes_of_nodes[0] == stored
    assert "28 quantized weights, dequantized while read" in fp8.note


def test_a_slice_costs_memory_of_the_slice(tmp_path: Path) -> None:
    """A tenth of a layer is read without the rest of the layer, or its scales."""
    dense = write_dense(
        tmp_path / "dense", "llama", hidden_size=512, intermediate_size=8192, num_hidden_layers=1
    )
    write_fp8(dense, tmp_path / "fp8", "blocks")
    checkpoint = HuggingFaceCheckpoint(tmp_path / "fp8")
    name, read = "model.layers.0.mlp.up_proj.weight", []
    checkpoint.read_stored, plain = (  # type: ignore[method-assign]
        lambda buffer, *where: (read.append(len(buffer)), plain(buffer, *where))[1],
        checkpoint.read_stored,
    )
    raw = memoryview(bytearray(2 * 800 * 512))
    checkpoint.read_into(raw[: 2 * 512], name, (0, 1), None)
    read.clear()
    tracemalloc.start()
    checkpoint.read_into(raw, name, (800, 1600), None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(read) == 800 * 512 + 50 * 32 * 4
    assert max(read) <= 2**14
    assert peak < 2**18


def _stored(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def write(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return write


def _said(**settings: Any) -> Callable[[Path], object]:
    def write(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"] |= settings
        (directory / "config.json").write_text(json.dumps(config))

    return write


def _silent(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))


SCALE = f"{DOWN}_scale_inv"
WRONG: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no config": ("blocks", _silent, "quantized by FP8 (it has"),
    "a scale is gone": (
        "blocks",
        _stored(lambda t: t.pop(SCALE)),
        f"{DOWN} is in FP8 and has no {SCALE}",
    ),
    "a scale without a weight": (
        "blocks",
        _stored(lambda t: t.pop(DOWN)),
        f"{SCALE} scales nothing",
    ),
    "a scale of a plain weight": (
        "blocks",
        _stored(lambda t: t.update({DOWN: t[DOWN].bfloat16()})),
        f"{SCALE} scales a weight in BF16",
    ),
    "scales of another size": (
        "blocks",
        _said(weight_block_size=[32, 16]),
        "for blocks of (32, 16) expected",
    ),
    "scales of another dtype": (
        "blocks",
        _stored(lambda t: t.update({SCALE: t[SCALE].double()})),
        "is in F64, not F32",
    ),
    "blocks that are none": ("blocks", _said(weight_block_size=[0, 1]), "cannot be read as fp8"),
    "a name of another method": ("fbgemm_fp8", _said(quant_method="fp8"), "has no"),
    "weights of 4 bits in the config": (
        "compressed-tensors, channel",
        _said(config_groups={"g": {"targets": ["Linear"], "weights": {"num_bits": 4}}}),
        "no config group says how",
    ),
    "a pattern that is none": (
        "compressed-tensors, channel",
        _said(config_groups={"g": {"targets": ["re:("], "weights": {}}}),
        "cannot be read as compressed-tensors",
    ),
    "a group of other layers": (
        "compressed-tensors, channel",
        _said(
            config_groups={
                "g": {
                    "targets": ["re:.*up_proj$"],
                    "weights": {"type": "float", "strategy": "channel"},
                }
            }
        ),
        "no config group says how",
    ),
    "rotations": (
        "compressed-tensors, channel",
        _said(transform_config={"config_groups": {"u": {"type": "hadamard"}}}),
        "quantized by compressed-tensors",
    ),
    "zeros that are left out": (
        "compressed-tensors, channel",
        _said(sparsity_config={"format": "sparse-bitmask"}),
        "quantized by compressed-tensors",
    ),
    "zero points": (
        "compressed-tensors, channel",
        _stored(lambda t: t.update({DOWN.replace("weight", "weight_zero_point"): torch.ones(1)})),
        "quantized by compressed-tensors (its quantization_config; it has",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_scales_are_never_dropped(dense: Path, tmp_path: Path, case: str) -> None:
    way, change, message = WRONG[case]
    write_fp8(dense, tmp_path / "fp8", way)
    change(tmp_path / "fp8")
    with pytest.raises(UpcyclingError) as error:
        open_checkpoint(str(tmp_path / "fp8"))
        open_dense(str(tmp_path / "fp8"))
    assert message in str(error.value)


def test_a_weight_that_is_no_number_is_seen(dense: Path, tmp_path: Path) -> None:
    write_fp8(dense, tmp_path / "fp8", "blocks")

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[DOWN].view(torch.uint8)[3, 5] = 0x7F

    _stored(damage)(tmp_path / "fp8")
    with pytest.raises(UpcyclingError, match=f"Tensor {DOWN} of .* holds NaN or Inf"):
        upcycle_directory(str(tmp_path / "fp8"), tmp_path / "moe", UpcyclingConfig())


def test_a_base_model_and_shards(tmp_path: Path) -> None:
    """Names without `model.`, as AutoModel saves them, and scales in another file than weights."""
    dense = write_dense(tmp_path / "dense", "qwen2, tied")
    plain = write_fp8(dense, tmp_path / "fp8", "blocks")
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    base = {name.removeprefix("model."): tensor for name, tensor in stored.items()}
    (tmp_path / "fp8" / "model.safetensors").unlink()
    parts = {"a": {n: t for n, t in base.items() if "scale" in n}}
    parts["b"] = {n: t for n, t in base.items() if n not in parts["a"]}
    for file, tensors in parts.items():
        save_file(tensors, tmp_path / "fp8" / f"{file}.safetensors")
    index = {name: f"{file}.safetensors" for file, tensors in parts.items() for name in tensors}
    (tmp_path / "fp8" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index})
    )
    checkpoint = HuggingFaceCheckpoint(tmp_path / "fp8")
    whole = load_file(plain / "model.safetensors")
    assert torch.equal(read_block(checkpoint, DOWN, (0, 64), None), whole[DOWN])
    open_dense(str(tmp_path / "fp8"))


def test_the_config_alone_is_planned_for(dense: Path, tmp_path: Path) -> None:
    write_fp8(dense, tmp_path / "fp8", "blocks")
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "fp8" / "config.json", tmp_path / "alone")
    assert open_dense(str(tmp_path / "alone")).arch == open_dense(str(tmp_path / "fp8")).arch

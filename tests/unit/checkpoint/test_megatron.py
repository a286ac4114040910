"""Megatron checkpoints: what is read, what is refused, and that nothing in them is run."""

import json
import math
import os
import pickle
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_upcycle.checkpoint import MegatronCheckpoint, open_checkpoint
from nemo_upcycle.checkpoint.checks import check_tensors
from nemo_upcycle.checkpoint.megatron_metadata import check_files
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture, family_of
from nemo_upcycle.plans.rank import Shard, make_plan

LAYERS, HIDDEN, FFN, VOCAB = 2, 8, 12, 16
NUMBERS = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": FFN,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 2,
    "seq_length": 32,
    "rotary_base": 500000,
    "layernorm_epsilon": 1e-5,
    "vocab_size": VOCAB,
}
ARGS = {
    **{name: value for name, value in NUMBERS.items() if name != "layernorm_epsilon"},
    "vocab_size": VOCAB - 3,  # what the user typed
    "group_query_attention": True,
    "norm_epsilon": 1e-5,
    "normalization": "RMSNorm",
    "swiglu": True,
    "untie_embeddings_and_output_weights": True,
    "num_experts": None,
}
LAYER = "decoder.layers."
FC1 = LAYER + "mlp.linear_fc1.weight"


def tensors() -> dict[str, torch.Tensor]:
    """Return a dense Llama as Megatron stores it, layers stacked."""
    shapes = {
        "embedding.word_embeddings.weight": (VOCAB, HIDDEN),
        LAYER + "self_attention.linear_qkv.layer_norm_weight": (LAYERS, HIDDEN),
        LAYER + "self_attention.linear_qkv.weight": (LAYERS, 16, HIDDEN),
        LAYER + "self_attention.linear_proj.weight": (LAYERS, HIDDEN, 8),
        LAYER + "mlp.linear_fc1.layer_norm_weight": (LAYERS, HIDDEN),
        FC1: (LAYERS, 2 * FFN, HIDDEN),
        LAYER + "mlp.linear_fc2.weight": (LAYERS, HIDDEN, FFN),
        "decoder.final_layernorm.weight": (HIDDEN,),
        "output_layer.weight": (VOCAB, HIDDEN),
    }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save(directory: Path, stored: dict[str, torch.Tensor], axis: int = -1) -> Path:
    """Write weights as two ranks would, each tensor cut in two across an axis."""
    directory.mkdir(parents=True)
    metadata = Metadata({}, storage_data={})
    for name, values in stored.items():
        chunks = []
        for rank, part in enumerate(values.split(-(-values.shape[axis] // 2), axis)):
            offsets = [0] * values.dim()
            offsets[axis] = rank * part.shape[axis] if rank == 0 else values.shape[axis] // 2
            with open(directory / f"__{rank}_0.distcp", "ab") as file:
                start = file.tell()
                torch.save(part.clone(), file)
                place = _StorageInfo(file.name.rpartition("/")[2], start, file.tell() - start)
            metadata.storage_data[MetadataIndex(name, offsets)] = place
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), part.shape))
        properties = TensorProperties(dtype=values.dtype)
        entry = TensorStorageMetadata(properties, values.shape, chunks)
        metadata.state_dict_metadata[name] = entry
    metadata.state_dict_metadata["decoder.layers.mlp._extra_state/shard_0_2"] = (
        BytesStorageMetadata()
    )
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    torch.save({"args": Namespace(**ARGS), "iteration": 3}, directory / "common.pt")
    return directory


def save_nemo(directory: Path, stored: dict[str, torch.Tensor], **config: Any) -> Path:
    """Write a NeMo 2 checkpoint."""
    save(directory / "weights", {f"module.{name}": values for name, values in stored.items()})
    (directory / "context").mkdir()
    silu = {"_target_": "torch.nn.functional.silu", "_call_": False}
    model = {
        "_target_": "nemo.collections.llm.gpt.model.llama.LlamaModel",
        "config": {**NUMBERS, "activation_func": silu, "params_dtype": None, **config},
    }
    (directory / "context" / "model.yaml").write_text(yaml.safe_dump(model))
    return directory


def read(checkpoint: MegatronCheckpoint, name: str) -> torch.Tensor:
    """Read a whole tensor."""
    info = checkpoint.tensors[name]
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[info.dtype]
    values = torch.zeros(info.shape, dtype=dtype)
    buffer = memoryview(values.view(-1).view(torch.uint8).numpy())
    checkpoint.read_into(buffer, name, (0, info.shape[0]), None)
    return values


def architecture(source: Path) -> Architecture:
    """Open a checkpoint, check all that can be checked without reading weights."""
    checkpoint = open_checkpoint(str(source))
    family = family_of(checkpoint.config)
    arch = family.architecture(checkpoint.config)
    check_tensors(checkpoint.tensors, family, arch, str(source))
    return arch


@pytest.mark.parametrize("axis", [0, -1])
def test_layers_come_apart_and_chunks_together(tmp_path: Path, axis: int) -> None:
    """Cut along the first axis, whole layers lie in one chunk."""
    stored = tensors()
    checkpoint = MegatronCheckpoint(save(tmp_path / "saved", stored, axis))
    for name, values in stored.items():
        if not name.startswith(LAYER):
            assert torch.equal(read(checkpoint, name), values)
            continue
        for layer in range(LAYERS):
            found = read(checkpoint, name.replace(LAYER, f"{LAYER}{layer}."))
            assert torch.equal(found, values[layer]), name
    assert len(checkpoint.tensors) == 3 + 6 * LAYERS


def test_bfloat16_is_read_as_it_is(tmp_path: Path) -> None:
    stored = {name: values.bfloat16() for name, values in tensors().items()}
    checkpoint = MegatronCheckpoint(save(tmp_path / "saved", stored))
    name = "output_layer.weight"
    assert torch.equal(read(checkpoint, name), stored[name])


def test_norms_that_are_not_fused_have_the_fused_names(tmp_path: Path) -> None:
    stored = tensors()
    norms = {
        LAYER + "self_attention.linear_qkv.layer_norm_weight": LAYER + "input_layernorm.weight",
        LAYER + "mlp.linear_fc1.layer_norm_weight": LAYER + "pre_mlp_layernorm.weight",
    }
    local = {norms.get(name, name): values for name, values in stored.items()}
    checkpoint = MegatronCheckpoint(save(tmp_path / "saved", local))
    for fused in norms:
        found = read(checkpoint, fused.replace(LAYER, f"{LAYER}1."))
        assert torch.equal(found, stored[fused][1])


def test_the_optimizer_is_left_out(tmp_path: Path) -> None:
    optimizer = {"optimizer.state.exp_avg.output_layer.weight": torch.zeros(4, 4)}
    optimizer["chained_0." + next(iter(optimizer))] = torch.zeros(4, 4)
    checkpoint = MegatronCheckpoint(save(tmp_path / "saved", tensors() | optimizer))
    assert not [name for name in checkpoint.tensors if "optimizer" in name]


def test_all_layouts_are_found(tmp_path: Path) -> None:
    iteration = save(tmp_path / "lm" / "iter_0000003", tensors())
    (tmp_path / "lm" / "latest_checkpointed_iteration.txt").write_text("3\n")
    nemo = save_nemo(tmp_path / "nemo", tensors())
    found = [architecture(d) for d in (iteration, tmp_path / "lm", nemo, nemo / "weights")]
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert found[0] == found[2]
    assert found[0].rotary_base == 500000
    assert found[0].rope_scaling is None


def test_rope_scaling_of_both_kinds(tmp_path: Path) -> None:
    lm = save(tmp_path / "lm", tensors())
    scaled = Namespace(**ARGS, use_rope_scaling=True, rope_scaling_factor=32.0)
    torch.save({"args": scaled}, lm / "common.pt")
    nemo = save_nemo(
        tmp_path / "nemo",
        tensors(),
        scale_factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        old_context_len=8192,
    )
    expected = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert architecture(lm).rope_scaling == architecture(nemo).rope_scaling == expected


def test_vocabulary_is_read_without_padding(tmp_path: Path) -> None:
    """NeMo records the real size or none; Megatron-LM's may lack special tokens."""
    recorded = save_nemo(tmp_path / "recorded", tensors(), vocab_size=VOCAB - 3)
    unknown = save_nemo(tmp_path / "unknown", tensors(), vocab_size=None)
    lm = save(tmp_path / "lm", tensors())
    sizes = [architecture(directory).vocab_size for directory in (recorded, unknown, lm)]
    assert sizes == [VOCAB - 3, VOCAB, VOCAB]
    checkpoint = MegatronCheckpoint(recorded)
    name = "embedding.word_embeddings.weight"
    assert torch.equal(read(checkpoint, name), tensors()[name][: VOCAB - 3])


def test_a_model_with_too_few_rows_for_the_vocabulary_is_refused(tmp_path: Path) -> None:
    checkpoint = MegatronCheckpoint(save(tmp_path / "saved", tensors()))
    family = family_of(checkpoint.config)
    arch = family.architecture(checkpoint.config)
    shape = (VOCAB - 1, HIDDEN)
    shard = Shard("embedding.word_embeddings.weight", shape, (0, 0), shape)
    with pytest.raises(UpcyclingError, match=r"has 15 rows, the dense checkpoint gives 16"):
        make_plan([shard], checkpoint.tensors, family, arch, UpcyclingConfig())


def test_files_of_the_optimizer_are_checked_too(tmp_path: Path) -> None:
    state = tensors() | {"optimizer.state.exp_avg.x": torch.zeros(100_000)}
    directory = save(tmp_path / "saved", state)
    check_files(directory)
    for file in directory.glob("*.distcp"):
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UpcyclingError, match=r"distcp has \d+ bytes of the \d+ that .metadata"):
        check_files(directory)
    (directory / ".metadata").write_bytes(b"")
    with pytest.raises(UpcyclingError, match="metadata"):
        check_files(directory)


UNSUPPORTED = {
    "num_moe_experts": (8, "is an MoE already"),
    "add_qkv_bias": (True, "add_qkv_bias=True; only False"),
    "add_bias_linear": (True, "add_bias_linear"),
    "qk_layernorm": (True, "qk_layernorm"),
    "normalization": ("LayerNorm", "normalization='LayerNorm'"),
    "activation_func": ("megatron.core.activations.squared_relu", "squared_relu"),
    "position_embedding_type": ("learned_absolute", "position_embedding_type"),
    "window_size": ([4096, 0], "window_size"),
    "num_query_groups": (3, "to divide the first"),
    "num_layers": ("two", "num_layers='two'; expected a positive integer"),
    "kv_channels": (2**31, "kv_channels=2147483648; expected a positive integer, at most"),
    "rotary_base": (math.nan, "rotary_base=nan; expected a positive number"),
    "layernorm_epsilon": (math.inf, "layernorm_epsilon=inf; expected a positive number"),
    "init_method_std": (10**400, "…; expected a positive number"),
    "hidden_size": (None, "hidden_size=None"),
    "ffn_hidden_size": (10, "do not fit its config"),
    "vocab_size": (VOCAB + 1, "do not fit its config"),
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_a_config_asks_for_and_cannot_be_upcycled(tmp_path: Path, field: str) -> None:
    value, message = UNSUPPORTED[field]
    with pytest.raises(UpcyclingError, match=message):
        architecture(save_nemo(tmp_path / "nemo", tensors(), **{field: value}))


def change_metadata(directory: Path, change: Callable[[Metadata], object]) -> None:
    """Rewrite `.metadata`."""
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def place(metadata: Metadata, name: str = FC1) -> _StorageInfo:
    """Return where the first chunk of a tensor is."""
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


def _outside(path: str) -> Callable[[Path], None]:
    def change(metadata: Metadata) -> None:
        place(metadata).relative_path = path

    return lambda d: change_metadata(d, change)


def _lose_chunk(metadata: Metadata) -> None:
    metadata.state_dict_metadata[FC1].chunks.pop()


def _lose_place(metadata: Metadata) -> None:
    del metadata.storage_data[next(i for i in metadata.storage_data if i.fqn == FC1)]


def _overlap(metadata: Metadata) -> None:
    entry = metadata.state_dict_metadata[FC1]
    entry.chunks[1] = entry.chunks[0]


def _too_large(metadata: Metadata) -> None:
    entry = metadata.state_dict_metadata[FC1]
    entry.size = torch.Size([10**9, *entry.size[1:]])
    entry.chunks = [ChunkStorageMetadata(torch.Size([0, 0, 0]), entry.size)]


def _other_place(metadata: Metadata) -> None:
    other = place(metadata, LAYER + "mlp.linear_fc2.weight")
    place(metadata).offset, place(metadata).length = other.offset, other.length


def _wrong_dtype(metadata: Metadata) -> None:
    metadata.state_dict_metadata[FC1].properties.dtype = torch.bfloat16


def _transformed(metadata: Metadata) -> None:
    place(metadata).transform_descriptors = ["zstd"]


def _truncate(name: str, by: int) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[:-by])

    return change


def _garbage(name: str) -> Callable[[Path], None]:
    return lambda d: (d / name).write_bytes(b"\x00garbage" * 50) and None


def _zeros_in_file(directory: Path) -> None:
    path = directory / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no .metadata": (lambda d: (d / ".metadata").unlink(), "has no .metadata"),
    "empty .metadata": (lambda d: (d / ".metadata").write_bytes(b""), "cannot be read"),
    ".metadata is garbage": (_garbage(".metadata"), "cannot be read"),
    ".metadata is another object": (
        lambda d: (d / ".metadata").write_bytes(pickle.dumps([1, 2])),
        "does not describe a complete checkpoint",
    ),
    ".metadata ends early": (_truncate(".metadata", 40), "cannot be read"),
    "a file is missing": (lambda d: (d / "__1_0.distcp").unlink(), "lacks 1 of the 2 files"),
    "a file ends early": (_truncate("__1_0.distcp", 400), "of the .* that .metadata says"),
    "a file is zeros": (_zeros_in_file, "cannot be read as a file of torch.save"),
    "a chunk is missing": (
        lambda d: change_metadata(d, _lose_chunk),
        f"the parts of {FC1} have 192 elements of 384",
    ),
    "a chunk has no place": (lambda d: change_metadata(d, _lose_place), "is nowhere"),
    "chunks overlap": (lambda d: change_metadata(d, _overlap), "overlap at"),
    "a chunk is larger than its file": (lambda d: change_metadata(d, _too_large), "too few for"),
    "a chunk is another's": (lambda d: change_metadata(d, _other_place), "not of one checkpoint"),
    "the dtype is another": (lambda d: change_metadata(d, _wrong_dtype), "holds .* in F32"),
    "a chunk is compressed": (lambda d: change_metadata(d, _transformed), "zstd"),
    "a path goes up": (_outside("../__0_0.distcp"), "no plain file name"),
    "a path is absolute": (_outside("/etc/passwd"), "no plain file name"),
    "a path is the parent": (_outside(".."), "no plain file name"),
    "zarr": (
        lambda d: (d / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "sharded_backend='zarr'; expected .* torch_dist",
    ),
    "no metadata.json": (lambda d: (d / "metadata.json").unlink(), "is missing; expected"),
    "metadata.json is a list": (lambda d: (d / "metadata.json").write_text("[]"), "cannot be read"),
    "legacy": (lambda d: (d / "mp_rank_00").mkdir(), "legacy format"),
    "common.pt is garbage": (_garbage("common.pt"), "cannot be read as a file of torch.save"),
    "no common.pt": (lambda d: (d / "common.pt").unlink(), "does not describe the model"),
    "no args": (lambda d: torch.save({}, d / "common.pt"), "no args in common.pt"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(tmp_path: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    directory = save(tmp_path / "saved", tensors())
    damage(directory)
    with pytest.raises(UpcyclingError, match=message):
        architecture(directory)
        checkpoint = MegatronCheckpoint(directory)
        for name in checkpoint.tensors:
            read(checkpoint, name)


def test_an_moe_is_refused_by_its_tensors(tmp_path: Path) -> None:
    router = {LAYER + "mlp.router.weight": torch.zeros(LAYERS, 4, HIDDEN)}
    with pytest.raises(UpcyclingError, match=r"is an MoE already: it has .*router\.weight"):
        open_checkpoint(str(save(tmp_path / "saved", tensors() | router)))


def test_an_unfinished_checkpoint_is_refused(tmp_path: Path) -> None:
    nemo = save_nemo(tmp_path / "step=5-last", tensors())
    (tmp_path / "step=5-last-unfinished").touch()
    for directory in (nemo, nemo / "weights"):
        with pytest.raises(UpcyclingError, match="was not saved completely"):
            open_checkpoint(str(directory))


@pytest.mark.parametrize("content", ["12", "../../etc", ""])
def test_a_tracker_that_names_nothing_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(content)
    with pytest.raises(UpcyclingError, match="expected an iteration"):
        open_checkpoint(str(tmp_path))


class Payload:
    """A pickle of it runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.command = f"touch '{trace}'"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def _in_metadata(directory: Path, payload: Payload) -> None:
    change_metadata(directory, lambda m: setattr(m, "planner_data", payload))


def _as_metadata(directory: Path, payload: Payload) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(payload))


def _in_args(directory: Path, payload: Payload) -> None:
    torch.save({"args": Namespace(**ARGS, rng=payload)}, directory / "common.pt")


def _as_args(directory: Path, payload: Payload) -> None:
    torch.save({"args": payload}, directory / "common.pt")


def _in_weights(directory: Path, payload: Payload) -> None:
    """Put the payload where the first tensor was."""
    path = directory / "__0_0.distcp"
    data = path.read_bytes()
    torch.save(payload, path)
    length = path.stat().st_size
    path.write_bytes(path.read_bytes() + data)

    def change(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            if info.relative_path == path.name:
                info.offset += length
        place(metadata).offset, place(metadata).length = 0, length

    change_metadata(directory, change)


ATTACKS = {
    "in .metadata": (_in_metadata, None),
    "instead of .metadata": (_as_metadata, "does not describe a complete checkpoint"),
    "in args": (_in_args, None),
    "instead of args": (_as_args, "no args in common.pt"),
    "in the weights": (_in_weights, "it holds a posix.system"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_pickle_is_run(tmp_path: Path, attack: str) -> None:
    attacked, message = ATTACKS[attack]
    directory, trace = save(tmp_path / "saved", tensors()), tmp_path / "trace"
    attacked(directory, Payload(trace))
    outcome = "inert"
    try:
        architecture(directory)
        checkpoint = MegatronCheckpoint(directory)
        for name in checkpoint.tensors:
            read(checkpoint, name)
    except UpcyclingError as error:
        outcome = str(error)
    assert not trace.exists()
    if message is None:
        assert outcome == "inert"
    else:
        with pytest.raises(UpcyclingError, match=message):
            raise UpcyclingError(outcome)


def test_the_payload_does_run_when_it_is_unpickled(tmp_path: Path) -> None:
    """So that the test above can fail."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


def test_nothing_in_a_context_is_run(tmp_path: Path) -> None:
    nemo, trace = save_nemo(tmp_path / "nemo", tensors()), tmp_path / "trace"
    model = nemo / "context" / "model.yaml"
    command = f"touch {trace}"
    tags = [f'!!python/object/apply:os.system ["{command}"]', "!!python/name:os.system ''"]
    lines = "".join(f"  attack{index}: {tag}\n" for index, tag in enumerate(tags))
    model.write_text(model.read_text().replace("config:\n", "config:\n" + lines))
    target = {"_target_": "os.system", "command": command}
    (nemo / "context" / "io.json").write_text(json.dumps({"root": target}))
    assert architecture(nemo).num_layers == LAYERS
    assert not trace.exists()
    model.write_text(tags[0])
    with pytest.raises(UpcyclingError, match=r"cannot be read as NeMo 2's model\.yaml"):
        open_checkpoint(str(nemo))
    assert not trace.exists()


def test_a_config_cut_in_half_is_one_line(tmp_path: Path) -> None:
    nemo = save_nemo(tmp_path / "nemo", tensors())
    model = nemo / "context" / "model.yaml"
    model.write_text(json.dumps(yaml.safe_load(model.read_text()))[:80])
    with pytest.raises(UpcyclingError, match=r"cannot be read as NeMo 2's model\.yaml") as error:
        open_checkpoint(str(nemo))
    assert "\n" not in str(error.value)


def test_a_compressed_chunk_is_refused(tmp_path: Path) -> None:
    """Its bytes cannot be read in place, and a small file could grow without bound."""
    directory = save(tmp_path / "saved", tensors())
    common = directory / "common.pt"
    with zipfile.ZipFile(common) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(common, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in entries.items():
            new.writestr(name, data)
    with pytest.raises(UpcyclingError, match="is compressed"):
        open_checkpoint(str(directory))

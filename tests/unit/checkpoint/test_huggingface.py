"""Bad Hugging Face directories give one clear error."""

import json
import multiprocessing
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemo_upcycle.checkpoint import HuggingFaceCheckpoint, open_checkpoint
from nemo_upcycle.checkpoint.checks import check_tensors
from nemo_upcycle.checkpoint.safetensors_header import read_header
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import family_of
from tests.tiny import write_llama

SHARD = "model-00001-of-00004.safetensors"
INDEX = "model.safetensors.index.json"


def _write(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda directory: (directory / name).write_bytes(data)


def _index(directory: Path, change: dict[str, object]) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] |= change
    (directory / INDEX).write_text(json.dumps(index))


def _header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Change the parsed header of a file; its length changes with it."""

    def damage(directory: Path) -> None:
        data = (directory / SHARD).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header = change(header) or header
        text = json.dumps(header).encode()
        (directory / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + data[start:])

    return damage


def _first(header: dict) -> dict:
    return next(entry for name, entry in header.items() if name != "__metadata__")


def _overlap(header: dict) -> None:
    one, other = [header[name]["data_offsets"] for name in header if name != "__metadata__"][:2]
    other[:] = one[0], one[0] + other[1] - other[0]


def _shift(header: dict) -> None:
    _first(header)["data_offsets"] = [offset + 10**9 for offset in _first(header)["data_offsets"]]


def _replace_by_link(target: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / SHARD).unlink()
        (directory / SHARD).symlink_to(target)

    return damage


def _truncate(directory: Path) -> None:
    data = (directory / SHARD).read_bytes()
    (directory / SHARD).write_bytes(data[:-1])


def _pickle(directory: Path) -> None:
    torch.save({"x": torch.ones(2)}, directory / SHARD)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"

FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (_write("config.json", "{"), "cannot be read as JSON"),
    "config is a list": (_write("config.json", "[]"), "holds a list"),
    "config has a number without end": (
        _write("config.json", f'{{"rope_theta": {"9" * 5000}}}'),
        "cannot be read as JSON",
    ),
    "config is nested without end": (_write("config.json", "[" * 10**5), "cannot be read as JSON"),
    "config is no text": (_write("config.json", b"\xff\xfe{}"), "cannot be read as JSON"),
    "a shard is missing": (lambda d: (d / SHARD).unlink(), "lacks 1 of the 4 files"),
    "a shard is a directory": (
        lambda d: ((d / SHARD).unlink(), (d / SHARD).mkdir()),
        "lacks 1 of the 4 files",
    ),
    "a shard is a dangling link": (_replace_by_link("../blobs/gone"), "lacks 1 of the 4 files"),
    "a shard is a link to itself": (_replace_by_link(SHARD), "lacks 1 of the 4 files"),
    "an empty shard": (_write(SHARD, ""), "has 0 bytes"),
    "a truncated shard": (_truncate, "bytes of the"),
    "a Git LFS pointer": (_write(SHARD, LFS), "git lfs pull"),
    "a pickle named safetensors": (_pickle, "it is a pickled PyTorch file"),
    "a web page named safetensors": (_write(SHARD, "<!DOCTYPE html><html>"), "as safetensors"),
    "an absurd header length": (_write(SHARD, b"\xff" * 8 + b"{}"), "fewer than its header alone"),
    "a header that is no JSON": (
        _write(SHARD, (4).to_bytes(8, "little") + b"{no}"),
        "its header is not one",
    ),
    "a header that is a list": (_header(lambda header: [1]), "its header is not one"),
    "a header without places": (
        _header(lambda header: _first(header).pop("data_offsets") and None),
        "its header is not one",
    ),
    "places beyond the file": (_header(_shift), "that its header says"),
    "places that overlap": (_header(_overlap), "overlap"),
    "a negative place": (
        _header(lambda header: _first(header).update(data_offsets=[-8, 0])),
        "its header is not one",
    ),
    "a shape that is not its bytes'": (
        _header(lambda header: _first(header).update(shape=[10**12, 10**12])),
        "its header is not one",
    ),
    "index is no JSON": (_write(INDEX, "no"), "cannot be read"),
    "index without a map": (_write(INDEX, "{}"), "weight_map"),
    "index with an empty map": (_write(INDEX, '{"weight_map": {}}'), "has an empty weight_map"),
    "index of no names": (lambda d: _index(d, {"x": 5}), "cannot be read"),
    "index leaves the directory": (
        lambda d: _index(d, {"x": "../../etc/passwd"}),
        "outside its directory",
    ),
    "index names an absolute path": (
        lambda d: _index(d, {"x": "/etc/passwd"}),
        "outside its directory",
    ),
    "index leaves by a linked directory": (
        lambda d: ((d / "sub").symlink_to("/etc"), _index(d, {"x": "sub/passwd"})),
        "outside its directory",
    ),
    "index names a tensor that is not there": (
        lambda d: _index(d, {"ghost": SHARD}),
        "its files lack: ghost",
    ),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_llama(tmp_path_factory.mktemp("sharded"), shard_size="180KB")
    assert len(list(directory.glob("*.safetensors"))) == 4
    return directory


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(sharded: Path, tmp_path: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    directory = Path(shutil.copytree(sharded, tmp_path / "dense"))
    damage(directory)
    with pytest.raises(UpcyclingError, match=message):
        _ = HuggingFaceCheckpoint(directory).tensors


CONTRADICTIONS: dict[str, tuple[dict, str]] = {
    "heads": ({"num_attention_heads": 4}, "q_proj.weight is [64, 64], expected [32, 64]"),
    "groups": ({"num_key_value_heads": 2}, "k_proj.weight is [32, 64], expected [16, 64]"),
    "hidden size": ({"hidden_size": 128}, "expected [128"),
    "FFN": ({"intermediate_size": 80}, "gate_proj.weight is [96, 64], expected [80, 64]"),
    "vocabulary": ({"vocab_size": 300}, "embed_tokens.weight is [256, 64], expected [300, 64]"),
    "more layers": ({"num_hidden_layers": 5}, "missing: model.layers.4."),
    "fewer layers": ({"num_hidden_layers": 3}, "not known: model.layers.3."),
}


@pytest.mark.parametrize("contradiction", CONTRADICTIONS)
def test_config_that_contradicts_the_weights(dense: Path, contradiction: str) -> None:
    change, message = CONTRADICTIONS[contradiction]
    checkpoint = HuggingFaceCheckpoint(dense)
    family = family_of(checkpoint.config)
    check_tensors(checkpoint.tensors, family, family.architecture(checkpoint.config), "here")
    wrong = family.architecture(checkpoint.config | change)
    with pytest.raises(UpcyclingError, match=re.escape(message)):
        check_tensors(checkpoint.tensors, family, wrong, "here")


def test_a_linked_shard_is_read(sharded: Path, tmp_path: Path) -> None:
    """So the hub's cache keeps them."""
    directory = Path(shutil.copytree(sharded, tmp_path / "dense"))
    (directory / SHARD).rename(tmp_path / "blob")
    (directory / SHARD).symlink_to(tmp_path / "blob")
    assert HuggingFaceCheckpoint(directory).tensors == HuggingFaceCheckpoint(sharded).tensors


@pytest.mark.skipif(os.geteuid() != 0, reason="other users' files are root's to make")
@pytest.mark.parametrize("locked", ["config.json", SHARD, INDEX, ".", ".."])
def test_what_may_not_be_read(sharded: Path, locked: str) -> None:
    """A process that gives up root is refused; once the mode is mended, the process reads."""
    with tempfile.TemporaryDirectory(dir="/tmp") as outside:
        above = Path(outside)
        above.chmod(0o755)
        directory = Path(shutil.copytree(sharded, above / "dense"))
        directory.chmod(0o755)
        for file in directory.iterdir():
            file.chmod(0o644)
        path = directory / locked
        mode = path.resolve().stat().st_mode
        path.resolve().chmod(0)
        context = multiprocessing.get_context("fork")
        found, send = context.Pipe(duplex=False)
        for expected in ("ermission denied", f"{len(HuggingFaceCheckpoint(sharded).tensors)} read"):
            process = context.Process(target=_read_as_nobody, args=(directory, send))
            process.start()
            assert expected in found.recv()
            process.join()
            path.resolve().chmod(mode)


def _read_as_nobody(directory: Path, send: Connection) -> None:
    os.setegid(65534)
    os.seteuid(65534)
    try:
        send.send(f"{len(open_checkpoint(str(directory)).tensors)} read")
    except UpcyclingError as error:
        send.send(str(error))
    except BaseException as error:
        send.send(f"not an UpcyclingError: {type(error)}")


def test_not_a_directory(tmp_path: Path) -> None:
    with pytest.raises(UpcyclingError, match="No dense checkpoint at"):
        HuggingFaceCheckpoint(tmp_path / "nothing")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UpcyclingError, match="is a file"):
        HuggingFaceCheckpoint(file)


def test_a_tensor_that_is_twice(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("a", "b"):
        save_file({"same": torch.ones(2), name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    index = {"a": "a.safetensors", "b": "b.safetensors", "same": "a.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(UpcyclingError, match=r"in both a\.safetensors and b\.safetensors"):
        _ = HuggingFaceCheckpoint(tmp_path).tensors


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(UpcyclingError, match="can run code"):
        _ = HuggingFaceCheckpoint(tmp_path).tensors


def test_hub_name_is_looked_up_in_the_local_cache_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UpcyclingError, match="hf download"):
        HuggingFaceCheckpoint("some-org/some-model")


@pytest.mark.parametrize("length", [640, 896, 1152])
def test_a_header_whose_length_begins_as_a_pickle(tmp_path: Path, length: int) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"x": entry}).encode().ljust(length)
    data = length.to_bytes(8, "little") + header + b"\0" * 4
    (tmp_path / "x.safetensors").write_bytes(data)
    assert list(read_header(tmp_path, "x.safetensors")) == ["x"]

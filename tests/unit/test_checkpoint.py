"""Bad Hugging Face directories give one clear error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemo_upcycle.checkpoint import HuggingFaceCheckpoint
from nemo_upcycle.errors import UpcyclingError
from tests.tiny import write_llama


def _write(name: str, content: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_text(content) and None


def _index(directory: Path, change: dict[str, str]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= change
    path.write_text(json.dumps(index))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (_write("config.json", "{"), "cannot be read as JSON"),
    "config is a list": (_write("config.json", "[]"), "holds a list"),
    "a shard is missing": (
        lambda d: (d / "model-00002-of-00004.safetensors").unlink(),
        "lacks 1 of the",
    ),
    "an empty shard": (_write("model-00001-of-00004.safetensors", ""), "as safetensors"),
    "index is no JSON": (_write("model.safetensors.index.json", "no"), "cannot be read"),
    "index without a map": (_write("model.safetensors.index.json", "{}"), "weight_map"),
    "index leaves the directory": (
        lambda d: _index(d, {"x": "../../etc/passwd"}),
        "outside its directory",
    ),
    "index names a tensor that is not there": (
        lambda d: _index(d, {"ghost": "model-00001-of-00004.safetensors"}),
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
        save_file({"same": torch.ones(2)}, tmp_path / f"{name}.safetensors")
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

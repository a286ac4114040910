"""A GGUF file is the model that transformers loads from it."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_upcycle import UpcyclingConfig, upcycle_directory
from nemo_upcycle.checkpoint import GGUFCheckpoint, open_checkpoint
from nemo_upcycle.checkpoint.described import open_dense
from nemo_upcycle.checkpoint.kept import kept_of
from nemo_upcycle.checkpoint.tokenizer_directory import tokenizer_directory
from nemo_upcycle.checkpoint.tokenizer_files import load_tokenizer
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import architecture_of
from tests.corpora import TEXTS
from tests.gguf_files import write_gguf
from tests.quantized import read_block
from tests.tiny import write_dense

pytest.importorskip("gguf")

K = {"hidden_size": 256, "intermediate_size": 256}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama in F32": ("llama", "F32", {}),
    "llama in F16": ("llama", "F16", {}),
    "llama in BF16": ("llama", "BF16", {}),
    "llama in 8 bits": ("llama", "Q8_0", {}),
    "llama in 4 bits": ("llama", "Q4_0", {}),
    "llama in K-quants": ("llama", "Q6_K", K),
    "qwen2, with biases": ("qwen2", "Q8_0", {}),
    "qwen2, tied": ("qwen2, tied", "Q5_0", {}),
    "qwen3, with norms of queries": ("qwen3", "Q8_0", {"head_dim": 128}),
}


def _transformers(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, gguf_file="tiny.gguf")


@pytest.mark.parametrize("case", CASES)
def test_weights_and_config_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    family, kind, changes = CASES[case]
    dense = write_dense(tmp_path / "dense", family, num_hidden_layers=2, **changes)
    source = write_gguf(dense, tmp_path / "gguf" / "tiny.gguf", kind)
    model, checkpoint = _transformers(source), open_checkpoint(str(source / "tiny.gguf"))
    assert isinstance(checkpoint, GGUFCheckpoint)
    open_dense(str(source))
    assert checkpoint.architecture == architecture_of(model.config.to_dict())
    expected = model.state_dict()
    for name in checkpoint.tensors:
        whole = expected[name] if expected[name].ndim == 2 else expected[name][:, None]
        rows, columns = whole.shape
        assert torch.equal(read_block(checkpoint, name, (0, rows)).float(), whole), name
        if columns > 1:
            part = read_block(checkpoint, name, (5, rows - 3), (7, columns - 9))
            assert torch.equal(part.float(), whole[5 : rows - 3, 7 : columns - 9]), name


def test_the_moe_computes_what_the_file_does(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", "llama")
    source = write_gguf(dense, tmp_path / "gguf" / "tiny.gguf", "Q8_0")
    upcycle_directory(str(source), tmp_path / "moe", UpcyclingConfig(num_moe_experts=4))
    ids = torch.arange(48).view(2, 24)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")(ids).logits
        expected = _transformers(source)(ids).logits
    assert (found - expected).abs().max() <= 1e-5
    said = kept_of(source)["config"]
    assert (said["bos_token_id"], said["eos_token_id"]) == (3, 4)


def test_the_tokenizer_is_the_files(tokenizer: Path, tmp_path: Path) -> None:
    model = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    dense = write_dense(tmp_path / "dense", "llama", vocab_size=len(words))
    source = write_gguf(dense, tmp_path / "gguf" / "tiny.gguf", "F16", words=words, merges=merges)
    directory = tokenizer_directory(source)
    assert directory is not None and directory == tokenizer_directory(source / "tiny.gguf")
    expected = AutoTokenizer.from_pretrained(source, gguf_file="tiny.gguf")
    for text in TEXTS[:20]:
        assert load_tokenizer(directory).encode(text) == expected.encode(text)


def test_the_plan_counts_the_bytes_of_the_file(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", "llama")
    source = write_gguf(dense, tmp_path / "gguf" / "tiny.gguf", "Q4_0")
    size, file = open_dense(str(source)).bytes, (source / "tiny.gguf").stat().st_size
    assert 0.8 * file < size < file


def test_no_damage_is_another_error(tmp_path: Path) -> None:
    """A flipped byte of the header, or a file that ends there, is read or refused by name."""
    write_gguf(write_dense(tmp_path / "dense", "llama"), tmp_path / "tiny.gguf", "Q8_0")
    file, draw = tmp_path / "tiny.gguf", random.Random(0)
    good, refused = file.read_bytes(), 0
    header = good.index(b"output_norm.weight")
    for number in range(300):
        damaged = bytearray(good)
        damaged[draw.randrange(header)] = draw.choice((0, 255, draw.randrange(256)))
        file.write_bytes(damaged if number % 3 else good[: draw.randrange(header)])
        try:
            open_dense(str(tmp_path))
        except UpcyclingError:
            refused += 1
    assert refused > 100


Change = Callable[[Path, Path], object]


def _with(**extra: Any) -> Change:
    return lambda dense, file: write_gguf(dense, file, "Q8_0", extra)


def _cut(dense: Path, file: Path) -> None:
    write_gguf(dense, file, "Q8_0")
    file.write_bytes(file.read_bytes()[:-5000])


def _two(dense: Path, file: Path) -> None:
    write_gguf(dense, file, "Q8_0")
    file.with_name("other.gguf").touch()


def _part(dense: Path, file: Path) -> None:
    write_gguf(dense, file, "Q8_0", {"add_uint16": ("split.count", 3)})


def _of_another_kind(dense: Path, file: Path) -> None:
    from gguf import GGUFWriter

    file.parent.mkdir()
    writer = GGUFWriter(file, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


REFUSED: dict[str, tuple[Change, str]] = {
    "RoPE scaling": (
        _with(add_rope_scaling_factor=4.0),
        "llama.rope.scaling.factor=4.0, which transformers does not read",
    ),
    "a window": (_with(add_sliding_window=16), "llama.attention.sliding_window=16"),
    "experts": (_with(add_expert_count=8), "llama.expert_count=8"),
    "heads of another width": (_with(add_key_length=16), "llama.attention.key_length=16"),
    "a part of a file": (_part, "it is one of 3 parts; `llama-gguf-split --merge` joins them"),
    "a file that was cut": (_cut, "cannot be read as GGUF"),
    "two files": (_two, "holds several GGUF files (other.gguf, tiny.gguf)"),
    "another architecture": (_of_another_kind, "general.architecture is 'mamba'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    change(write_dense(tmp_path / "dense", "llama"), tmp_path / "gguf" / "tiny.gguf")
    with pytest.raises(UpcyclingError) as error:
        open_dense(str(tmp_path / "gguf"))
    assert message in str(error.value)


def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_upcycle.checkpoint.gguf_file.find_spec", lambda name: None)
    (tmp_path / "tiny.gguf").touch()
    with pytest.raises(UpcyclingError, match=r"GGUF, llama[.]cpp's format.*`pip install gguf`"):
        open_dense(str(tmp_path))

"""Several dense checkpoints as one: experts from each, everything else averaged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_upcycle.checkpoint import DenseCheckpoint
from nemo_upcycle.checkpoint.branches import branch_name, open_branches, split_sources
from nemo_upcycle.checkpoint.described import open_dense
from nemo_upcycle.checkpoint.dtypes import torch_dtype
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import family_of
from nemo_upcycle.plans.rank import Shard, make_plan
from tests.tiny import write_dense, write_llama
from tests.tokenizers import write_tokenizer

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("branches")
    return [write_llama(directory / str(seed), seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def checkpoint(sources: list[Path]) -> DenseCheckpoint:
    return open_branches(",".join(map(str, sources)))


def read(checkpoint: DenseCheckpoint, name: str) -> torch.Tensor:
    info = checkpoint.tensors[name]
    values = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
    raw = memoryview(values.view(-1).view(torch.uint8).numpy())
    checkpoint.read_into(raw, name, (0, info.shape[0]), None)
    return values


def test_feed_forward_tensors_are_each_branchs(
    checkpoint: DenseCheckpoint, sources: list[Path]
) -> None:
    for branch, source in enumerate(sources):
        expected = load_file(source / "model.safetensors")[UP]
        assert torch.equal(read(checkpoint, branch_name(branch, UP)), expected)


@pytest.mark.parametrize("name", [UP, NORM, "model.layers.2.self_attn.k_proj.weight"])
def test_everything_is_averaged(
    checkpoint: DenseCheckpoint, sources: list[Path], name: str
) -> None:
    values = [load_file(source / "model.safetensors")[name] for source in sources]
    assert torch.equal(read(checkpoint, name), torch.stack(values).sum(0) / 3)


def test_bf16_is_averaged_in_fp32(tmp_path: Path) -> None:
    """1 + 2⁻⁷ and 1 are neighbors in bf16; the average of 1, 1 + 2⁻⁷, 1 + 2⁻⁷ is the second."""
    directories = []
    for number, value in enumerate((1.0, 1 + 2**-7, 1 + 2**-7)):
        directory = write_llama(tmp_path / str(number))
        tensors = load_file(directory / "model.safetensors")
        tensors = {name: t.to(torch.bfloat16) for name, t in tensors.items()}
        tensors[NORM] = torch.full_like(tensors[NORM], value)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        directories.append(str(directory))
    assert float(read(open_branches(",".join(directories)), NORM)[0]) == 1 + 2**-7


def test_experts_come_from_the_branches_in_turn(checkpoint: DenseCheckpoint) -> None:
    family = family_of(checkpoint.config)
    arch = family.architecture(checkpoint.config)
    shards = [
        Shard(
            f"decoder.layers.0.mlp.experts.{expert}.linear_fc2.weight", (64, 48), (0, 0), (64, 48)
        )
        for expert in range(12)
    ]
    upcycling = UpcyclingConfig(num_moe_experts=12, granularity=2)
    plan = make_plan(shards, checkpoint.tensors, family, arch, upcycling, 3)
    found = {
        target.shard: (block.tensor.partition(":")[0], block.columns)
        for block, targets in plan.copies.items()
        for target in targets
    }
    halves = [(0, 48), (48, 96)]
    assert found == {e: (str(e // 2 % 3), halves[e % 2]) for e in range(12)}


def test_bytes_are_those_of_all_branches(sources: list[Path]) -> None:
    one = open_dense(str(sources[0]))
    three = open_dense(";".join(map(str, sources)))
    assert three.branches == 3
    assert three.bytes == 3 * one.bytes


def test_a_name_with_a_comma(tmp_path: Path) -> None:
    directory = write_llama(tmp_path / "a, b")
    assert split_sources(str(directory)) == [str(directory)]
    assert split_sources("a; b,c") == ["a", "b", "c"]
    for nothing in ("a,,b", "", " "):
        with pytest.raises(UpcyclingError, match="semicolons: 'DIR1; DIR2'"):
            split_sources(nothing)


@pytest.mark.parametrize("between", [" ", ":", " | ", "+", "\n", "; 0 "])
def test_what_separates_checkpoints_otherwise_is_refused(
    sources: list[Path], between: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sources[0].parent)
    with pytest.raises(UpcyclingError, match="semicolons: 'DIR1; DIR2'"):
        split_sources(between.join(("0", "1")))
    assert split_sources("/only/on the nodes") == ["/only/on the nodes"]


def test_what_computes_nothing_may_differ(sources: list[Path], tmp_path: Path) -> None:
    """A branch trained on for longer contexts, or drawn otherwise, is of the same architecture."""
    other = write_llama(tmp_path, max_position_embeddings=4096, initializer_range=0.02)
    assert open_dense(f"{sources[0]},{other}").branches == 2


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("llama", {"intermediate_size": 128}, "ffn_hidden_size 96 and 128"),
        ("llama", {"rope_theta": 5e5}, "rotary_base 10000.0 and 500000.0"),
        ("mistral", {"sliding_window": None}, "model_type llama and mistral"),
    ],
)
def test_other_architectures_are_refused(
    sources: list[Path], tmp_path: Path, family: str, config: dict, message: str
) -> None:
    other = write_dense(tmp_path, family, **config)
    with pytest.raises(UpcyclingError, match=message):
        open_branches(f"{sources[0]},{other}")


def with_tokenizer(directory: Path, seed: int, swapped: tuple[str, str] | None = None) -> Path:
    """Write a checkpoint with a tokenizer, in which two tokens have changed places."""
    write_tokenizer(write_llama(directory, seed=seed), "BPE")
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    for one, other in [swapped] if swapped else []:
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(content))
    return directory


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    """Row i of the averaged embeddings would be another token in each."""
    first = with_tokenizer(tmp_path / "first", 0)
    other = with_tokenizer(tmp_path / "other", 1, ("a", "b"))
    expected = rf"The tokenizers of {first} and {other} differ: row \d+ of the embeddings is 'a'"
    with pytest.raises(UpcyclingError, match=expected):
        open_branches(f"{first}; {other}")


@pytest.mark.parametrize("change", ["nothing", "no tokenizer", "a token more", "written otherwise"])
def test_tokenizers_that_have_the_same_tokens_are_taken(tmp_path: Path, change: str) -> None:
    first = with_tokenizer(tmp_path / "first", 0)
    other = with_tokenizer(tmp_path / "other", 1)
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    if change == "no tokenizer":
        file.unlink()
    elif change == "a token more":
        chat = {"id": 400, "content": "<|turn|>", "special": True}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"].append(chat | flags)
    if change in ("a token more", "written otherwise"):
        file.write_text(json.dumps(content, indent=1))
    assert len(open_branches(f"{first}; {other}").branches) == 2

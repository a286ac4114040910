"""The plan covers every shard, whatever its rectangle, with the right rows of the right tensors."""

import random

import numpy as np
import pytest

from nemo_upcycle.checkpoint import TensorInfo
from nemo_upcycle.checkpoint.checks import check_tensors
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture, architecture_of
from nemo_upcycle.families.llama import LLAMA
from nemo_upcycle.initializers.random import normal_row
from nemo_upcycle.plans.rank import (
    BUFFERS,
    Plan,
    Shard,
    chunks,
    make_plan,
    peak_bytes,
)
from tests.tiny import CONFIG

ARCH = LLAMA.architecture({**CONFIG, "model_type": "llama"})
TENSORS = {name: TensorInfo(shape, "BF16") for name, shape in LLAMA.shapes(ARCH).items()}
LAYER = "decoder.layers.2."


def plan(*shards: Shard, arch: Architecture = ARCH, **upcycling: object) -> Plan:
    return make_plan(shards, TENSORS, LLAMA, arch, UpcyclingConfig(**upcycling))


def whole(name: str, *shape: int) -> Shard:
    return Shard(name, shape, (0,) * len(shape), shape)


def expected_rows(name: str) -> list[tuple[str, int]]:
    """Name row by row where linear_qkv and linear_fc1 come from, written out the long way."""
    rows: list[tuple[str, int]] = []
    if "linear_qkv" in name:
        for group in range(4):
            for head in (2 * group, 2 * group + 1):
                rows += [("q_proj", head * 8 + i) for i in range(8)]
            rows += [("k_proj", group * 8 + i) for i in range(8)]
            rows += [("v_proj", group * 8 + i) for i in range(8)]
    else:
        rows = [("gate_proj", i) for i in range(96)] + [("up_proj", i) for i in range(96)]
    return rows


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        (LAYER + "self_attention.linear_qkv.weight", 128),
        (LAYER + "mlp.experts.5.linear_fc1.weight", 192),
        (LAYER + "mlp.linear_fc1.weight", 192),
    ],
)
def test_any_rectangle_gets_its_rows(name: str, rows: int) -> None:
    generator = random.Random(0)
    expected = expected_rows(name)
    for _ in range(50):
        start = generator.randrange(rows)
        stop = generator.randrange(start, rows) + 1
        column = generator.randrange(64)
        shard = Shard(name, (rows, 64), (start, column), (stop - start, 64 - column))
        found: dict[int, tuple[str, int]] = {}
        for block, targets in plan(shard).copies.items():
            assert block.columns == (column, 64)
            assert block.tensor.startswith("model.layers.2.")
            for target in targets:
                for i in range(target.rows[1] - target.rows[0]):
                    assert target.rows[0] + i not in found
                    source = block.tensor.split(".")[-2], block.rows[0] + i
                    found[target.rows[0] + i] = source
        assert [found[i] for i in range(stop - start)] == expected[start:stop]


def test_experts_of_a_rank_share_one_read() -> None:
    shards = [whole(f"{LAYER}mlp.experts.{e}.linear_fc2.weight", 64, 96) for e in range(8)]
    found = plan(*shards)
    assert len(found.copies) == 1
    assert len(next(iter(found.copies.values()))) == 8
    assert found.bytes_to_read == 64 * 96 * 2


def test_norm_before_experts_is_the_norm_fused_into_the_dense_layer() -> None:
    (block,) = plan(whole(LAYER + "pre_mlp_layernorm.weight", 64)).copies
    assert block.tensor == "model.layers.2.post_attention_layernorm.weight"


def test_memory_is_that_of_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of ten of down_proj's half rows of 96 bytes; eight experts take each."""
    monkeypatch.setattr("nemo_upcycle.plans.rank.CHUNK_BYTES", 1000)
    name = LAYER + "mlp.experts.{}.linear_fc2.weight"
    halves = [Shard(name.format(expert), (64, 96), (0, 48), (64, 48)) for expert in range(8)]
    found, one = plan(*halves), plan(halves[0])
    (block,) = found.copies
    assert list(chunks(block, TENSORS))[:2] == [(0, 10), (10, 20)]
    assert peak_bytes(found, TENSORS, "BF16") == BUFFERS * 10 * 96
    assert peak_bytes(found, TENSORS, "F32") == BUFFERS * 10 * 96 + 10 * 192
    assert peak_bytes(one, TENSORS, "F32") == BUFFERS * 10 * 96
    monkeypatch.setattr("nemo_upcycle.plans.rank.CHUNK_BYTES", 10)
    assert list(chunks(block, TENSORS))[:2] == [(0, 1), (1, 2)]
    monkeypatch.setattr("nemo_upcycle.plans.rank.CHUNK_BYTES", 10**6)
    assert peak_bytes(found, TENSORS, "BF16") == 64 * 96  # one chunk takes one buffer


def test_padded_vocabulary() -> None:
    found = plan(Shard("output_layer.weight", (260, 64), (250, 0), (10, 64)))
    (block,) = found.copies
    assert block.rows == (250, 256)
    assert [target.rows for target in found.zeros] == [(6, 10)]
    only_padding = plan(Shard("output_layer.weight", (260, 64), (257, 0), (3, 64)))
    assert not only_padding.copies
    assert [target.rows for target in only_padding.zeros] == [(0, 3)]


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (whole(LAYER + "mlp.experts.0.linear_fc1.weight", 180, 64), "180 rows"),
        (whole(LAYER + "mlp.experts.0.linear_fc1.weight", 96, 64), "moe_ffn_hidden_size=96"),
        (whole(LAYER + "mlp.experts.0.linear_fc2.weight", 64, 90), "columns"),
        (whole(LAYER + "mlp.experts.0.linear_fc1.bias", 192), "has no tensor"),
        (whole(LAYER + "mlp.router.weight", 4, 64), r"expected \[8, 64\]"),
        (whole("decoder.layers.9.input_layernorm.weight", 64), "has no tensor"),
        (whole("decoder.layers.9.mlp.linear_fc2.weight", 64, 96), "has no model.layers.9"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(shard: Shard, message: str) -> None:
    with pytest.raises(UpcyclingError, match=message):
        plan(shard)


def test_tensors_are_checked_all_at_once() -> None:
    tensors = dict(TENSORS)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.extra"] = TensorInfo((1,), "BF16")
    tensors["model.embed_tokens.weight"] = TensorInfo((255, 64), "BF16")
    tensors["lm_head.weight"] = TensorInfo((256, 64), "I8")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = TensorInfo((4,), "F32")
    with pytest.raises(UpcyclingError) as error:
        check_tensors(tensors, LLAMA, ARCH, "here")
    for words in (
        "1 missing: model.norm.weight",
        "1 not known: model.layers.0.mlp.extra",
        "model.embed_tokens.weight is [255, 64], expected [256, 64]",
        "lm_head.weight is I8",
    ):
        assert words in str(error.value)
    check_tensors(TENSORS, LLAMA, ARCH, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"num_key_value_heads": 3}, "3 key-value heads"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "RoPE scaling 'dynamic'.* sequence's length"),
    ],
)
def test_configs_that_cannot_be_upcycled(change: dict, message: str) -> None:
    config = {**CONFIG, "model_type": "llama", **change}
    with pytest.raises(UpcyclingError, match=message):
        architecture_of(config)


def test_random_rows_are_independent_of_each_other_and_of_their_order() -> None:
    rows = {(layer, e): normal_row(7, 1, layer, e, 0, 64) for layer in (0, 1) for e in range(8)}
    again = normal_row(7, 1, 1, 3, 0, 64)
    assert np.array_equal(rows[1, 3], again)
    assert len({row.tobytes() for row in rows.values()}) == 16
    assert not np.array_equal(normal_row(8, 1, 1, 3, 0, 64), again)
    assert not np.array_equal(normal_row(7, 2, 1, 3, 0, 64), again)

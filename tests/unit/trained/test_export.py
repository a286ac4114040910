"""What an export writes, byte for byte, from checkpoints that were written in this process."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.trained.export import export, plan_export
from tests.megatron_checkpoints import save_nemo, tensors
from tests.moe_checkpoints import KINDS, huggingface_weights, moe_weights, save_moe

PLAIN = KINDS["plain"]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a plain MoE; for reading alone."""
    return save_moe(tmp_path_factory.mktemp("saved") / "moe", PLAIN, moe_weights(PLAIN))


@pytest.mark.parametrize("name", KINDS)
def test_every_tensor_has_its_name_and_its_values(tmp_path: Path, name: str) -> None:
    kind, weights = KINDS[name], moe_weights(KINDS[name])
    export(save_moe(tmp_path / "saved", kind, weights), tmp_path / "hf")
    found, expected = load_file(tmp_path / "hf" / WEIGHTS), huggingface_weights(kind, weights)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert torch.equal(found[key], values), key
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == (
        kind.model_type
    )


@pytest.mark.parametrize("name", KINDS)
def test_transformers_opens_it(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    kind, weights = KINDS[name], moe_weights(KINDS[name])
    export(save_moe(tmp_path / "saved", kind, weights), tmp_path / "hf")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_half_precision_stays_as_it_is(tmp_path: Path) -> None:
    weights = {name: values.bfloat16() for name, values in moe_weights(PLAIN).items()}
    export(save_moe(tmp_path / "saved", PLAIN, weights), tmp_path / "hf")
    found = load_file(tmp_path / "hf" / WEIGHTS)
    for key, values in huggingface_weights(PLAIN, weights).items():
        assert torch.equal(found[key], values), key
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


def test_the_same_file_however_it_is_stored(tmp_path: Path, saved: Path) -> None:
    """Layers and experts stacked in one tensor, or one by one."""
    one_by_one = save_moe(tmp_path / "one by one", PLAIN, moe_weights(PLAIN), stacked=False)
    assert len(plan_export(one_by_one).checkpoint.tensors) == len(
        plan_export(saved).checkpoint.tensors
    )
    for number, source in enumerate((saved, one_by_one)):
        export(source, tmp_path / str(number))
    first, second = ((tmp_path / name / WEIGHTS).read_bytes() for name in "01")
    assert first == second


def test_padding_of_the_vocabulary_is_left_out(tmp_path: Path) -> None:
    source = save_moe(tmp_path / "saved", PLAIN, moe_weights(PLAIN), vocab_size=13)
    export(source, tmp_path / "hf")
    found = load_file(tmp_path / "hf" / WEIGHTS)
    whole = huggingface_weights(PLAIN, moe_weights(PLAIN))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(found[name], whole[name][:13])


def test_chunks_make_no_difference(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(saved, tmp_path / "large")
    monkeypatch.setattr("nemo_upcycle.plans.rank.CHUNK_BYTES", 100)
    seen: list[tuple[int, int]] = []
    export(saved, tmp_path / "small", lambda *at: seen.append(at))
    assert len(seen) > 100
    large, small = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("large", "small"))
    assert large == small


def test_many_files(tmp_path: Path, saved: Path) -> None:
    seen: list[tuple[int, int]] = []
    plan = export(saved, tmp_path / "hf", lambda *at: seen.append(at), shard_bytes=4_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == plan.bytes == seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)
    files = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(files) > 3
    assert {file.name for file in files} == set(index["weight_map"].values())
    found = {}
    for file in files:
        part = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in part)
        assert sum(values.nbytes for values in part.values()) <= 4_000
        found |= part
    for name, values in huggingface_weights(PLAIN, moe_weights(PLAIN)).items():
        assert torch.equal(found[name], values)


def test_a_capacity_that_may_drop_tokens_is_said(tmp_path: Path) -> None:
    for factor, said in ((None, None), (1.0, 1.0), (4.0, None)):
        source = save_moe(
            tmp_path / str(factor), PLAIN, moe_weights(PLAIN), moe_expert_capacity_factor=factor
        )
        assert plan_export(source).capacity_factor == said


# --- What is refused -----------------------------------------------------------------------------


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UpcyclingError, match="of a dense model"):
        plan_export(save_nemo(tmp_path / "dense", tensors()))


def test_what_was_exported_is_not_exported_again(tmp_path: Path, saved: Path) -> None:
    export(saved, tmp_path / "hf")
    with pytest.raises(UpcyclingError, match="is a Hugging Face directory already"):
        plan_export(tmp_path / "hf")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"moe_router_score_function": "sqrtsoftplus"}, "expected one of: softmax, sigmoid"),
        ({"moe_router_topk_scaling_factor": 2.5}, "moe_router_topk_scaling_factor=2.5"),
        ({"moe_ffn_hidden_size": 6}, "do not belong together"),
        ({"moe_shared_expert_intermediate_size": 1000}, "a shared expert is the dense"),
        ({"moe_shared_expert_intermediate_size": 6}, "has nothing for 6 tensors of a Qwen2Moe"),
        (
            {"moe_router_pre_softmax": True, "window_size": [3, 0]},
            "together with a sliding window",
        ),
        ({"add_qkv_bias": True, "qk_layernorm": True}, "together with their biases"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_transformers_does_not_compute(tmp_path: Path, config: dict, message: str) -> None:
    source = save_moe(tmp_path / "saved", PLAIN, moe_weights(PLAIN), **config)
    with pytest.raises(UpcyclingError, match=message):
        export(source, tmp_path / "hf")
    assert not list(tmp_path.glob("hf*"))


def test_a_tensor_that_goes_nowhere_is_refused(tmp_path: Path) -> None:
    weights = moe_weights(PLAIN) | {"decoder.layers.1.mlp.experts.0.linear_fc3.weight":
                                    torch.zeros(2, 2)}  # fmt: skip
    source = save_moe(tmp_path / "saved", PLAIN, weights, stacked=False)
    with pytest.raises(UpcyclingError, match=r"has nothing for 1 tensors: .*linear_fc3"):
        plan_export(source)


@pytest.mark.parametrize(
    "name", ["mlp.experts.3.linear_fc2.weight", "self_attention.linear_proj.weight"]
)
def test_a_tensor_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    weights = moe_weights(PLAIN)
    del weights[f"decoder.layers.1.{name}"]
    source = save_moe(tmp_path / "saved", PLAIN, weights, stacked=False)
    with pytest.raises(UpcyclingError, match=r"has nothing for 1 tensors of a Mixtral.*layers\.1"):
        export(source, tmp_path / "hf")
    assert not list(tmp_path.glob("hf*"))


# --- Nothing half done ---------------------------------------------------------------------------


def test_a_directory_that_exists_is_left_alone(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("hf", "link"):
        with pytest.raises(UpcyclingError, match="exists; expected a new directory"):
            export(saved, tmp_path / name)
    assert not list((tmp_path / "hf").iterdir())


def test_what_a_killed_export_left_is_replaced(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "hf.partial").mkdir()
    (tmp_path / "hf.partial" / "left").touch()
    export(saved, tmp_path / "hf")
    assert not (tmp_path / "hf.partial").exists()
    assert not (tmp_path / "hf" / "left").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path, saved: Path) -> None:
    def full(done: int, total: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UpcyclingError, match=r"No space left on device.* KiB free"):
        export(saved, tmp_path / "new" / "hf", full)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(tmp_path: Path, saved: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(saved, tmp_path / "hf", interrupt)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "file").touch()
    seen: list[int] = []
    with pytest.raises(UpcyclingError, match="cannot be written"):
        export(saved, tmp_path / "file" / "hf", lambda done, total: seen.append(done))
    assert not seen

"""What lies in people's directories: read as transformers reads it, or called by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_upcycle.checkpoint import open_checkpoint
from nemo_upcycle.checkpoint.described import check_whole, open_dense
from nemo_upcycle.cli.ranks import check_there
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.trained.opened import open_trained
from tests.tiny import CONFIG, into_hub_cache, write_dense, write_llama

INDEX = "model.safetensors.index.json"
Damage = Callable[[Path], object]


def _config(**change: Any) -> Damage:
    def write(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return write


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Change the tensors in place, or return others."""

    def write(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        changed = change(tensors)
        save_file(
            changed if isinstance(changed, dict) else tensors, directory / "model.safetensors"
        )

    return write


def _only(*names: str) -> Damage:
    """Leave the named files alone; those that were not there are empty."""

    def write(directory: Path) -> None:
        for path in directory.iterdir():
            if path.name not in names:
                path.unlink()
        for name in names:
            (directory / name).touch()

    return write


def _renamed(old: str, new: str) -> Damage:
    return lambda directory: (directory / old).rename(directory / new)


def _dangling(name: str) -> Damage:
    def write(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).symlink_to("../../blobs/gone")

    return write


def _quantized(name: str, dtype: torch.dtype = torch.uint8) -> Damage:
    whole = "model.layers.0.mlp.up_proj"
    return _tensors(lambda t: t.update({f"{whole}.{name}": torch.ones(8, dtype=dtype)}))


def _quantized_by(method: str, name: str, dtype: torch.dtype = torch.uint8) -> Damage:
    """A method in the config and one of its tensors in the file."""

    def write(directory: Path) -> None:
        _config(quantization_config={"quant_method": method})(directory)
        _quantized(name, dtype)(directory)

    return write


def _in_integers(method: str) -> Damage:
    """A method in the config, and a weight of integers under the weight's own name."""
    name = "model.layers.0.mlp.up_proj.weight"

    def write(directory: Path) -> None:
        _config(quantization_config={"quant_method": method})(directory)
        _tensors(lambda t: t.update({name: t[name].to(torch.int8)}))(directory)

    return write


METHODS: dict[str, tuple[str, str]] = {
    "GPTQ by config and tensors": ("gptq", "qweight"),
    "AWQ by config and tensors": ("awq", "qzeros"),
    "AutoRound by config and tensors": ("auto-round", "scales"),
    "bitsandbytes in 4 bits by config and tensors": ("bitsandbytes", "weight.absmax"),
    "bitsandbytes in 8 bits by config and tensors": ("bitsandbytes", "SCB"),
    "HQQ by config and tensors": ("hqq", "W_q"),
    "AQLM by config and tensors": ("aqlm", "codebooks"),
    "VPTQ by config and tensors": ("vptq", "centroids.weight"),
    "quanto by config and tensors": ("quanto", "weight._data"),
    "EETQ by config and tensors": ("eetq", "weight_scales"),
    "torchao by config and tensors": ("torchao", "_weight_qdata"),
    "compressed-tensors in 4 bits by config and tensors": ("compressed-tensors", "weight_packed"),
    "ModelOpt by config and tensors": ("modelopt", "weight_scale_2"),
    "MXFP4 by config and tensors": ("mxfp4", "weight_blocks"),
    "MLX by config and tensors": ("mlx", "biases"),
}
"""Quantization methods and one of their tensors."""
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN = {"model_type": "qwen3_moe", "num_experts": 16}
VISION = {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {}}
MOE_PART = {"model_type": "llama4", "text_config": {"num_local_experts": 16}}

REFUSED: dict[str, tuple[Damage, str]] = {
    **{
        case: (_quantized_by(method, tensor), f"quantized by {method} (its")
        for case, (method, tensor) in METHODS.items()
    },
    **{
        case.replace("config and tensors", "tensors alone"): (
            _quantized(tensor),
            "is quantized by ",
        )
        for case, (_, tensor) in METHODS.items()
    },
    "GPTQ by tensors": (_quantized("qweight", torch.int32), "quantized by GPTQ or AWQ"),
    "integers by config": (_in_integers("eetq"), "model.layers.0.mlp.up_proj.weight in I8"),
    "a method that computes otherwise": (
        _config(quantization_config={"quant_method": "bitnet"}),
        "quantized by bitnet (its quantization_config)",
    ),
    "bitsandbytes without a name": (
        lambda d: (
            _config(quantization_config={"load_in_4bit": True})(d),
            _quantized("weight.quant_map")(d),
        ),
        "call the model's dequantize()",
    ),
    "compressed-tensors by an old key": (
        lambda d: (
            _config(compression_config={"quant_method": "compressed-tensors"})(d),
            _quantized("weight_packed")(d),
        ),
        "quantized by compressed-tensors (its compression_config",
    ),
    "GPTQ by config alone": (
        lambda d: (
            _config(quantization_config={"quant_method": "gptq"})(d),
            _only("config.json")(d),
        ),
        "quantized by gptq (its quantization_config)",
    ),
    "FP8 by tensors": (_quantized("weight_scale_inv", torch.float32), "quantized by FP8"),
    "ZeRO-3": (
        _tensors(lambda t: t.update({"lm_head.weight": torch.empty(0)})),
        "1 empty: lm_head.weight is [0]. DeepSpeed ZeRO-3 left",
    ),
    "an adapter": (
        _only("adapter_config.json", "adapter_model.safetensors"),
        "an adapter (PEFT)",
    ),
    "an adapter beside a config": (
        _only("config.json", "adapter_model.safetensors"),
        "an adapter (PEFT)",
    ),
    "an adapter that changes the weights": (
        lambda d: (d / "adapter_config.json").write_text("{}"),
        "Merge the two",
    ),
    "Mixtral": (_config(**MIXTRAL), "is an MoE already (config.json says model_type='mixtral'"),
    "Qwen3-MoE": (_config(**QWEN), "dense LARGER --experts N`. To train an MoE on, run `nemo llm"),
    "an MoE in a part": (_config(**MOE_PART), "num_local_experts=16"),
    "an MoE by its name": (_config(model_type="granitemoe"), "is an MoE already"),
    "a model that sees": (_config(**VISION), "is a model of several parts"),
    "GGUF": (_only("model-q4.gguf"), "GGUF, llama.cpp's format"),
    "GGUF beside a config": (_only("config.json", "model-q4.gguf"), "gguf_file="),
    "ONNX": (_only("config.json", "model.onnx"), "an ONNX graph"),
    "TensorFlow": (_only("config.json", "tf_model.h5"), "from_tf=True"),
    "Flax": (_only("config.json", "flax_model.msgpack"), "from_flax=True"),
    "MLX": (_only("config.json", "weights.npz"), "MLX's or NumPy's"),
    "pickles": (_only("config.json", "pytorch_model.bin", "optimizer.pt"), "can run code"),
    "a tokenizer": (_only("tokenizer.json", "tokenizer_config.json"), "a tokenizer and no model"),
    "Mistral's own": (
        _only("config.json", "consolidated.safetensors", "params.json"),
        "under Mistral's or Meta's own names",
    ),
    "a variant": (_renamed("model.safetensors", "model.fp16.safetensors"), "a variant of"),
    "shards without index": (
        _renamed("model.safetensors", "model-00001-of-00002.safetensors"),
        "shards without model.safetensors.index.json",
    ),
    "another name": (_renamed("model.safetensors", "best.safetensors"), "(best.safetensors)"),
    "weights without config": (lambda d: (d / "config.json").unlink(), "Copy the config.json"),
    "DeepSpeed": (_only("config.json", "zero_to_fp32.py"), "Run `python zero_to_fp32.py"),
    "a directory of checkpoints": (
        lambda d: (
            _only()(d),
            (d / "checkpoint-5").mkdir(),
            (d / "checkpoint-5" / "config.json").touch(),
        ),
        "directories that are checkpoints (checkpoint-5)",
    ),
    "weights that are a dangling link": (
        _dangling("model.safetensors"),
        "links to files that are not there (model.safetensors)",
    ),
    "a config that is a dangling link": (
        _dangling("config.json"),
        "links to files that are not there (config.json)",
    ),
    "weights named by the config": (
        _config(transformers_weights="other.safetensors"),
        "transformers_weights='other.safetensors'",
    ),
    "a prefix of a wrapper": (
        _tensors(lambda t: {f"language_model.{name}": value for name, value in t.items()}),
        "All names begin with 'language_model.'",
    ),
    "a prefix of DDP": (
        _tensors(lambda t: {f"module.{name}": value for name, value in t.items()}),
        "All names begin with 'module.'",
    ),
    "a prefix of torch.compile": (
        _tensors(lambda t: {f"_orig_mod.{name}": value for name, value in t.items()}),
        "All names begin with '_orig_mod.'",
    ),
    "the base model alone": (
        _tensors(
            lambda t: {n.removeprefix("model."): v for n, v in t.items() if n != "lm_head.weight"}
        ),
        "1 missing: lm_head.weight. AutoModel saves a model without",
    ),
    "the base model's names and an output layer": (
        _tensors(lambda t: {n.removeprefix("model."): v for n, v in t.items()}),
        "not known: embed_tokens.weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(dense: Path, tmp_path: Path, case: str) -> None:
    damage, message = REFUSED[case]
    directory = Path(shutil.copytree(dense, tmp_path / "dense"))
    damage(directory)
    with pytest.raises(UpcyclingError) as error:
        open_dense(str(directory))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("model-q4.gguf",), "GGUF, llama.cpp's format, quantized as a rule (model-q4.gguf)"),
        (("adapter_config.json", "adapter_model.safetensors"), "an adapter (PEFT)"),
        (("tokenizer.json",), "a tokenizer and no model"),
        (("notes.txt",), "nothing that is known"),
    ],
    ids=["GGUF", "an adapter", "a tokenizer", "nothing"],
)
def test_what_runs_a_model_or_exports_it_calls_it_by_name_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr("nemo_upcycle.checkpoint.gguf_file.find_spec", lambda name: None)
    for name in names:
        (tmp_path / name).touch()
    for look in (check_there, open_trained):
        with pytest.raises(UpcyclingError) as error:
            look(tmp_path)
        assert f"{tmp_path} is no checkpoint: it holds {message}" in str(error.value)


def _other_weights(name: str) -> Damage:
    return lambda d: save_file({"model.norm.weight": torch.zeros(2)}, d / name)


def _index(directory: Path) -> None:
    """An index, as an older sharded save leaves it, of a file that is there and wrong."""
    _other_weights("model-00001-of-00001.safetensors")(directory)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (directory / INDEX).write_text(json.dumps(index))


def _with_mark(directory: Path) -> None:
    path = directory / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


BUFFERS = (
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
    "model.layers.0.self_attn.rotary_emb.cos_cached",
    "model.layers.0.self_attn.masked_bias",
    "model.layers.0.self_attn.bias",
)
READ: dict[str, Damage] = {
    "Mistral's own file": _other_weights("consolidated.safetensors"),
    "a variant": _other_weights("model.fp16.safetensors"),
    "adapter weights": _other_weights("adapter_model.safetensors"),
    "shards without index": _other_weights("model-00001-of-00002.safetensors"),
    "a stale index": _index,
    "pickles": lambda d: [
        (d / name).touch() for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt")
    ],
    "GGUF and ONNX": lambda d: [(d / name).touch() for name in ("model.gguf", "model.onnx")],
    "a mark before the config": _with_mark,
    "no quantization": _config(quantization_config=None),
    **{
        f"a left-over {method}": _config(quantization_config={"quant_method": method})
        for method in ("fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors", "of_tomorrow")
    },
    "buffers": _tensors(lambda t: t.update({name: torch.ones(2) for name in BUFFERS})),
}


@pytest.mark.parametrize("case", READ)
def test_read_as_transformers_reads(dense: Path, tmp_path: Path, case: str) -> None:
    """What it has no use for, and what the config makes, is not looked at."""
    from transformers import LlamaForCausalLM

    directory = Path(shutil.copytree(dense, tmp_path / "dense"))
    READ[case](directory)
    assert open_dense(str(directory)).arch == open_dense(str(dense)).arch
    name = "model.norm.weight"
    info, raw = open_checkpoint(str(directory)).tensors[name], bytearray(4 * 64)
    open_checkpoint(str(directory)).read_into(memoryview(raw), name, (0, 64), None)
    assert info.shape == (64,)
    found = torch.frombuffer(raw, dtype=torch.float32)
    assert torch.equal(found, load_file(dense / "model.safetensors")[name])
    if case == "no quantization" or case.startswith("a left-over"):
        assert not open_checkpoint(str(directory)).config.keys() & {"quantization_config"}
    elif case != "a mark before the config":  # at which it stops
        model = LlamaForCausalLM.from_pretrained(directory)
        assert torch.equal(found, model.model.norm.weight)


def test_tensors_that_the_index_does_not_name(tmp_path: Path) -> None:
    directory = write_llama(tmp_path, shard_size="180KB")
    file = next(directory.glob("*.safetensors"))
    save_file(load_file(file) | {"stale": torch.ones(2)}, file)
    assert "stale" not in open_checkpoint(str(directory)).tensors
    open_dense(str(directory))


def test_a_tied_base_model_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """AutoModel.save_pretrained leaves `model.` out; the embeddings are the output layer."""
    from transformers import AutoModelForCausalLM

    whole = write_dense(tmp_path / "whole", "qwen2, tied")
    model = AutoModelForCausalLM.from_pretrained(whole)
    model.model.save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    assert "embed_tokens.weight" in stored
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    base = open_checkpoint(str(tmp_path / "base"))
    check_whole(base)
    assert base.tensors == open_checkpoint(str(whole)).tensors
    name = "model.layers.2.self_attn.q_proj.weight"
    raw = bytearray(4 * 64 * 64)
    base.read_into(memoryview(raw), name, (0, 64), None)
    assert torch.equal(torch.frombuffer(raw, dtype=torch.float32).view(64, 64), again[name])


def test_a_moe_of_ours_is_named(tmp_path: Path) -> None:
    """What `nemo-upcycle export` writes of a plain model is a Mixtral; its config is enough."""
    config = {**CONFIG, **MIXTRAL}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UpcyclingError, match="is an MoE already"):
        open_dense(str(tmp_path))


def test_a_models_directory_in_the_hubs_cache_says_what_of_it_to_give(
    dense: Path, tmp_path: Path
) -> None:
    snapshot = into_hub_cache(dense, tmp_path / "hub", "some-org/some--model")
    with pytest.raises(UpcyclingError) as error:
        open_dense(str(snapshot.parents[1]))
    said = str(error.value)
    assert "holds a model of the hub's cache" in said
    assert f"Give {snapshot}, or the model's name, some-org/some--model." in said
    assert "\n" not in said
    moved = snapshot.parents[1].rename(tmp_path / "moved")
    with pytest.raises(UpcyclingError, match=f"Give {moved / 'snapshots' / snapshot.name}[.]$"):
        open_dense(str(moved))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "holds a part of the model's files"),
        ("model-00002-of-00004.safetensors", "lacks 1 of the 4 files"),
    ],
)
def test_a_partial_download_says_how_to_go_on(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, message: str
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    whole = dense if "-of-" not in missing else write_llama(tmp_path / "four", shard_size="180KB")
    snapshot = into_hub_cache(whole, tmp_path / "hub", "some-org/some-model")
    (snapshot / "README.md").touch()
    open_dense("some-org/some-model")
    (snapshot / missing).unlink()
    if missing == "config.json":
        (snapshot / "model.safetensors").unlink()
    with pytest.raises(UpcyclingError) as error:
        open_dense("some-org/some-model")
    assert message in str(error.value)
    assert "`hf download some-org/some-model`" in str(error.value)

"""Dense models that Megatron-LM and Megatron-Bridge have saved are upcycled, in all families."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.checkpoint import open_checkpoint
from nemo_upcycle.checkpoint.beside import UPCYCLED_FROM
from nemo_upcycle.checkpoint.described import open_dense
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from tests.distributed.pool import RankPool
from tests.distributed.whole import differing, whole
from tests.megatron import formats, scenarios
from tests.megatron.scenarios import UPCYCLING
from tests.quantized import write_fp8
from tests.tiny import FAMILIES, LLAMA31_ROPE, write_dense

DENSE = UpcyclingConfig(num_moe_experts=None)
SAVED_ON = ParallelFolding.of(tp=2)
UPCYCLED_ON = ParallelFolding.of(tp=2, ep=2)

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama, padded": ("llama", {"vocab_size": 255}),
    "llama, scaled RoPE": ("llama", {"rope_scaling": LLAMA31_ROPE}),
}

RECORDED = ("llama, padded", "llama, scaled RoPE", "llama, YaRN", "granite", "gemma")
"""What the hook records beside the checkpoints, because Megatron-LM's arguments cannot say it."""


def saved(
    ranks: RankPool, directory: Path, name: str, program: str, without: str = ""
) -> tuple[Path, Path]:
    """Return a dense Hugging Face checkpoint, and a program's checkpoint of the same model."""
    family, config = VARIANTS[name]
    dense, run = write_dense(directory / "dense", family, **config), directory / "run"
    ranks.run(
        formats.save,
        2,
        dense=dense,
        folding=SAVED_ON,
        upcycling=DENSE,
        run=run,
        program=program,
        without=without,
    )
    if name not in RECORDED:
        (run / UPCYCLED_FROM).unlink()
    return dense, run


def weights(ranks: RankPool, source: Path) -> dict[str, torch.Tensor]:
    """Return the parameters of the MoE that a dense checkpoint becomes."""
    found = ranks.run(
        scenarios.weights, 2, dense=str(source), folding=UPCYCLED_ON, upcycling=UPCYCLING
    )
    return whole(shard for rank in found for shard in rank)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("program", formats.PROGRAMS)
def test_the_moe_is_that_of_the_hugging_face_checkpoint(
    ranks: RankPool, tmp_path: Path, program: str, name: str
) -> None:
    dense, run = saved(ranks, tmp_path, name, program)
    family = open_checkpoint(str(dense)).family.model_type
    opened = open_dense(str(run))
    assert opened.family.model_type in (f"megatron {family}", "megatron llama")
    assert opened.arch == open_checkpoint(str(dense)).architecture
    assert differing(weights(ranks, run), weights(ranks, dense)) == []


def test_fp8_is_dequantized(ranks: RankPool, tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", "qwen2")
    plain = write_fp8(dense, tmp_path / "fp8", "blocks", torch.float32)
    assert differing(weights(ranks, tmp_path / "fp8"), weights(ranks, plain)) == []


WITHOUT: dict[tuple[str, str], str] = {
    ("qwen2", "--add-qkv-bias"): "4 not known: .*linear_qkv.bias",
    ("qwen3", "--qk-layernorm"): "8 not known: .*layernorm.weight",
    ("nemotron", "--apply-layernorm-1p"): "normalization='LayerNorm'",
    ("nemotron", "--squared-relu"): "activation_func='gelu'",
    ("llama", "--swiglu"): "activation_func='gelu' with gated_linear_unit=False",
    ("llama", "--disable-bias-linear"): "add_bias_linear=True",
    ("llama", "--untie-embeddings-and-output-weights"): "of one architecture",
    ("llama, linear RoPE", "--rotary-seq-len-interpolation-factor"): "of one architecture",
    ("mistral, window", "--window-size"): "of one architecture",
    ("nemotron", "--rotary-percent"): "of one architecture",
    ("smollm3", "--no-rope-freq"): "of one architecture",
}


@pytest.mark.parametrize(("name", "argument"), WITHOUT)
def test_an_argument_that_is_not_there_is_seen(
    ranks: RankPool, tmp_path: Path, name: str, argument: str
) -> None:
    """By the tensors, by the fields, or by the comparison of the branches' architectures."""
    dense, run = saved(ranks, tmp_path, name, "Megatron-LM", without=argument)
    with pytest.raises(UpcyclingError, match=WITHOUT[name, argument]):
        open_dense(str(run))
        found, expected = (open_checkpoint(str(each)).architecture for each in (run, dense))
        if found != expected:
            raise UpcyclingError("not of one architecture")


def test_a_function_that_nobody_recorded_is_asked_for(ranks: RankPool, tmp_path: Path) -> None:
    _, run = saved(ranks, tmp_path, "llama, padded", "Megatron-Bridge")
    path = run / f"iter_{formats.ITERATION:07d}" / "run_config.yaml"
    text = path.read_text()
    assert "activation_func: silu" in text
    path.write_text(text.replace("activation_func: silu", "nothing: 0"))
    open_dense(str(run))  # the run's own record says it
    (run / UPCYCLED_FROM).unlink()
    with pytest.raises(UpcyclingError, match="does not say which activation function"):
        open_dense(str(run))

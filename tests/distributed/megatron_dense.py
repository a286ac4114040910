"""Checkpoints of Megatron-LM and Megatron-Bridge, as ranks of any mapping save them."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.core import dist_checkpointing
from megatron.core.transformer.enums import AttnBackend

from nemo_upcycle.checkpoint import open_checkpoint
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.engine import load
from nemo_upcycle.families import Architecture
from nemo_upcycle.families.fields import architecture_fields, moe_fields
from nemo_upcycle.families.megatron import LLAMA_FIELDS
from tests.distributed import scenarios

DENSE = UpcyclingConfig(num_moe_experts=None)
ITERATION = 7


def save_dense(dense: Path, folding: ParallelFolding, directory: Path, **overrides: Any) -> None:
    """Fill the dense model from a Hugging Face checkpoint and save it as Megatron-LM does.

    Args:
        dense: The Hugging Face checkpoint.
        folding: The mapping.
        directory: Megatron-LM's `--save`: it gets `iter_0000007` and the file that names it.
        overrides: Fields of the model's config.
    """
    chunks = scenarios.build(dense, folding, DENSE, **overrides)
    checkpoint = open_checkpoint(str(dense))
    load.fill(chunks, checkpoint, DENSE)
    iteration = directory / f"iter_{ITERATION:07d}"
    iteration.mkdir(parents=True, exist_ok=True)
    arch = checkpoint.architecture
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    state = {
        "args": megatron_args(arch, folding),
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        **{name: chunk.sharded_state_dict() for name, chunk in zip(names, chunks, strict=True)},
    }
    dist_checkpointing.save(state, str(iteration))
    (directory / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


def save_moe(
    dense: Path,
    folding: ParallelFolding,
    upcycling: UpcyclingConfig,
    directory: Path,
    program: str,
) -> None:
    """Upcycle a Hugging Face checkpoint and save the MoE as a program does.

    Args:
        dense: The Hugging Face checkpoint.
        folding: The mapping.
        upcycling: What its feed-forward layers become.
        directory: The run's directory.
        program: `Megatron-LM` or `Megatron-Bridge`.
    """
    chunks = scenarios.upcycled(dense, folding, upcycling)
    arch = open_checkpoint(str(dense)).architecture
    iteration = directory / f"iter_{ITERATION:07d}"
    iteration.mkdir(parents=True, exist_ok=True)
    state = {"iteration": ITERATION, "model": chunks[0].sharded_state_dict()}
    moe = moe_fields(arch, upcycling)
    if program == "Megatron-LM":
        args = {**vars(megatron_args(arch, folding)), **moe}
        state["args"] = Namespace(**args, num_experts=moe["num_moe_experts"])
    dist_checkpointing.save(state, str(iteration))
    if program == "Megatron-Bridge" and torch.distributed.get_rank() == 0:
        fields = {"activation_func": "silu", **LLAMA_FIELDS, **architecture_fields(arch), **moe}
        model = {"_target_": "megatron.bridge.models.gpt.model_config.BridgeGPTModelConfig"}
        length = {"seq_length": arch.max_position_embeddings}
        run = {"model": {**model, **length, "transformer": fields}}
        (iteration / "run_config.yaml").write_text(yaml.safe_dump(run))
    (directory / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


def megatron_args(arch: Architecture, folding: ParallelFolding) -> Namespace:
    """Return what Megatron-LM's arguments say of a model, among much else."""
    return Namespace(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        group_query_attention=True,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.kv_channels,
        vocab_size=None,
        padded_vocab_size=arch.vocab_size,
        max_position_embeddings=arch.max_position_embeddings,
        norm_epsilon=arch.layernorm_epsilon,
        normalization="RMSNorm",
        position_embedding_type="rope",
        rotary_base=int(arch.rotary_base),
        rotary_percent=1.0,
        use_rope_scaling=arch.rope_scaling is not None,
        rope_scaling_factor=(arch.rope_scaling or {}).get("factor", 8.0),
        swiglu=True,
        squared_relu=False,
        add_bias_linear=False,
        add_qkv_bias=False,
        qk_layernorm=False,
        untie_embeddings_and_output_weights=not arch.share_embeddings_and_output_weights,
        init_method_std=arch.init_method_std,
        attention_backend=AttnBackend.unfused,
        params_dtype=torch.float32,
        tensor_model_parallel_size=folding.tensor_model_parallel_size,
        pipeline_model_parallel_size=folding.pipeline_model_parallel_size,
    )


def upcycled_from(
    source: Path, folding: ParallelFolding, upcycling: UpcyclingConfig
) -> scenarios.Shards:
    """Build the model that a dense checkpoint of any format asks for, fill it, return it."""
    checkpoint = open_checkpoint(str(source))
    arch = checkpoint.architecture
    chunks = scenarios.build_from(arch, folding, upcycling)
    load.fill(chunks, checkpoint, upcycling)
    return scenarios.shards(chunks)

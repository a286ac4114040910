"""Checkpoints as Megatron-LM and Megatron-Bridge write them, with their own writers' classes."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.training.config.container import ConfigContainerBase

from nemo_upcycle.checkpoint import open_checkpoint
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.families import Architecture
from nemo_upcycle.megatron import gpt_model_config, upcycle
from nemo_upcycle.plans.layout import padded_vocabulary
from tests.megatron import scenarios

ITERATION = 3
PROGRAMS = ("Megatron-LM", "Megatron-Bridge")


@dataclass
class _RunConfig(ConfigContainerBase):
    """Bridge's config, of which the model alone matters."""

    model: Any = None


def save(
    dense: Path,
    folding: ParallelFolding,
    upcycling: UpcyclingConfig,
    run: Path,
    program: str,
    without: str = "",
) -> None:
    """Upcycle and save a checkpoint.

    Args:
        dense: The dense checkpoint.
        folding: The mapping.
        upcycling: What its feed-forward layers become.
        run: The run's directory.
        program: `Megatron-LM` or `Megatron-Bridge`.
        without: An argument of Megatron-LM that the checkpoint is not to have.
    """
    hook = upcycle(str(dense), upcycling, resume_from=run)
    chunks = scenarios.build(dense, folding, upcycling, [hook])
    directory = run / f"iter_{ITERATION:07d}"
    directory.mkdir(parents=True, exist_ok=True)
    state = {"checkpoint_version": 3.0, "iteration": ITERATION, **scenarios.sharded_state(chunks)}
    if program == "Megatron-LM":
        arch = open_checkpoint(str(dense)).architecture
        typed = [words for words in arguments(arch, upcycling) if words.split()[0] != without]
        state["args"] = _parsed(typed, arch, folding)
    dist_checkpointing.save(state, str(directory))
    if torch.distributed.get_rank() == 0:
        (run / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
        if program == "Megatron-Bridge":
            config = gpt_model_config(str(dense), upcycling, folding, dtype=torch.float32)
            _RunConfig(model=config).to_yaml(str(directory / "run_config.yaml"))
            torch.save({"step": torch.tensor(ITERATION)}, run / "latest_train_state.pt")
    torch.distributed.barrier()


def arguments(arch: Architecture, upcycling: UpcyclingConfig) -> list[str]:
    """Return what one types to `pretrain_gpt.py` for a model, an argument each."""
    length = arch.max_position_embeddings
    typed = [
        f"--num-layers {arch.num_layers}",
        f"--hidden-size {arch.hidden_size}",
        f"--ffn-hidden-size {arch.ffn_hidden_size}",
        f"--num-attention-heads {arch.num_attention_heads}",
        f"--kv-channels {arch.kv_channels}",
        "--group-query-attention",
        f"--num-query-groups {arch.num_query_groups}",
        f"--norm-epsilon {arch.layernorm_epsilon}",
        "--disable-bias-linear",
        "--position-embedding-type rope",
        f"--rotary-base {int(arch.rotary_base)}",
        f"--init-method-std {arch.init_method_std}",
        f"--seq-length {length}",
        f"--max-position-embeddings {length}",
        "--micro-batch-size 1",
        f"--vocab-size {arch.vocab_size}",
        "--make-vocab-size-divisible-by 1",
        "--use-cpu-initialization",
    ]
    own = {
        "--swiglu": arch.gated_linear_unit,
        "--squared-relu": not arch.gated_linear_unit,
        "--normalization RMSNorm": not arch.norm_has_bias,
        "--normalization LayerNorm": arch.norm_has_bias,
        "--apply-layernorm-1p": arch.normalization.endswith("1p"),
        "--add-qkv-bias": arch.add_qkv_bias,
        "--qk-layernorm": arch.qk_layernorm,
        "--untie-embeddings-and-output-weights": not arch.share_embeddings_and_output_weights,
        f"--rotary-percent {arch.rotary_percent}": arch.rotary_percent != 1,
    }
    typed += [words for words, is_there in own.items() if is_there]
    if arch.seq_len_interpolation_factor is not None:
        typed.append(
            f"--rotary-seq-len-interpolation-factor {int(arch.seq_len_interpolation_factor)}"
        )
    if arch.nope_layers:
        skips = ",".join(str(int(layer in arch.nope_layers)) for layer in range(arch.num_layers))
        typed.append(f"--no-rope-freq [{skips}]")
    if arch.rope_scaling is not None and arch.rope_scaling["rope_type"] == "llama3":
        factor = arch.rope_scaling["factor"]
        typed += ["--use-rope-scaling", f"--rope-scaling-factor {factor}"]
    if arch.sliding_window is not None:
        typed.append(f"--window-size {arch.sliding_window - 1},0")
    if upcycling.num_moe_experts is not None:
        typed += [f"--num-experts {upcycling.num_moe_experts}", "--moe-router-topk 2"]
    return typed


def _parsed(typed: list[str], arch: Architecture, folding: ParallelFolding) -> Any:
    from megatron.training.arguments import parse_args

    words = ["pretrain_gpt.py", *(word for argument in typed for word in argument.split())]
    before, sys.argv = sys.argv, words
    try:
        args = parse_args()
    finally:
        sys.argv = before
    # Megatron-LM's validation, which needs a GPU, adds these.
    tp = folding.tensor_model_parallel_size
    args.padded_vocab_size = padded_vocabulary(arch.vocab_size, tp)
    args.params_dtype = torch.float32
    return args

"""Checkpoints as Megatron-LM and Megatron-Bridge write them, with their own writers' classes."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.training.config.container import ConfigContainerBase

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.megatron import gpt_model_config, upcycle
from tests.megatron import scenarios

ITERATION = 3

ARGUMENTS = (
    "--num-layers 4 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 8 --kv-channels 8 "
    "--group-query-attention --num-query-groups 4 --swiglu --normalization RMSNorm "
    "--norm-epsilon 1e-5 --disable-bias-linear --untie-embeddings-and-output-weights "
    "--position-embedding-type rope --rotary-base 10000 --init-method-std 0.1 --seq-length 128 "
    "--max-position-embeddings 128 --micro-batch-size 1 --num-experts 8 --moe-router-topk 2 "
    "--vocab-size 250 --make-vocab-size-divisible-by 1 --use-cpu-initialization"
)
"""What one types to `pretrain_gpt.py` for the model of `tests/stacks.py`."""


@dataclass
class _RunConfig(ConfigContainerBase):
    """Bridge's config, of which the model alone matters."""

    model: Any = None


def save(
    dense: Path, folding: ParallelFolding, upcycling: UpcyclingConfig, run: Path, program: str
) -> None:
    """Upcycle and save a checkpoint.

    Args:
        dense: The dense checkpoint.
        folding: The mapping.
        upcycling: What its feed-forward layers become.
        run: The run's directory.
        program: `Megatron-LM` or `Megatron-Bridge`.
    """
    hook = upcycle(str(dense), upcycling, resume_from=run)
    chunks = scenarios.build(dense, folding, upcycling, [hook])
    directory = run / f"iter_{ITERATION:07d}"
    directory.mkdir(parents=True, exist_ok=True)
    state = {"checkpoint_version": 3.0, "iteration": ITERATION, **scenarios.sharded_state(chunks)}
    if program == "Megatron-LM":
        state["args"] = _arguments()
    dist_checkpointing.save(state, str(directory))
    if torch.distributed.get_rank() == 0:
        (run / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
        if program == "Megatron-Bridge":
            config = gpt_model_config(str(dense), upcycling, folding, dtype=torch.float32)
            _RunConfig(model=config).to_yaml(str(directory / "run_config.yaml"))
            torch.save({"step": torch.tensor(ITERATION)}, run / "latest_train_state.pt")
    torch.distributed.barrier()


def _arguments() -> Any:
    from megatron.training.arguments import parse_args

    before, sys.argv = sys.argv, ["pretrain_gpt.py", *ARGUMENTS.split()]
    try:
        args = parse_args()
    finally:
        sys.argv = before
    args.padded_vocab_size = 252  # which Megatron-LM's validation adds
    args.params_dtype = torch.float32
    return args

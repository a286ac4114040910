"""What each recipe says, as plain data: dense model, upcycling, folding, schedule.

The NeMo-Run factories, the plan and the command line read it from here, so that no number is
written twice and only the factories import NeMo.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from nemo_upcycle.checkpoint import read_config
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.mapping import Architecture, family_of

T = TypeVar("T", UpcyclingConfig, ParallelFolding)
CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a recipe trains. Lengths in tokens, batch sizes in sequences."""

    seq_length: int
    global_batch_size: int
    micro_batch_size: int
    max_steps: int
    lr: float
    min_lr: float
    warmup_steps: int
    val_check_interval: int
    checkpoint_interval: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a global batch."""
        return self.seq_length * self.global_batch_size


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Attributes:
        name: What `--factory` takes.
        dense: Name of the dense model's Hugging Face config in `configs/`.
        upcycling: What its feed-forward layers become.
        folding: How the model is spread.
        schedule: How it trains.
        num_nodes: Nodes.
        num_gpus_per_node: GPUs a node.
    """

    name: str
    dense: str
    upcycling: UpcyclingConfig
    folding: ParallelFolding
    schedule: Schedule
    num_nodes: int = 1
    num_gpus_per_node: int = 1

    @cached_property
    def architecture(self) -> Architecture:
        """The dense model's numbers, from the config that the package ships."""
        return architecture(json.loads((CONFIGS / f"{self.dense}.json").read_text()))

    def architecture_of(self, dense_checkpoint: str | None) -> Architecture:
        """Return the numbers of a dense checkpoint, of the recipe's own model if it is not here.

        A recipe can be printed and planned without its checkpoint at hand.
        """
        if dense_checkpoint is not None and (Path(dense_checkpoint) / "config.json").is_file():
            return architecture(read_config(Path(dense_checkpoint)))
        return self.architecture


def select(kind: type[T], values: Mapping[str, Any]) -> T:
    """Make an `UpcyclingConfig` or a `ParallelFolding` of the values that are its fields.

    So that a factory, which must spell out its arguments for the command line, need not spell
    them out again.
    """
    return kind(**{name: values[name] for name in kind.__dataclass_fields__ if name in values})


def architecture(config: dict[str, Any]) -> Architecture:
    """Return the numbers of a parsed Hugging Face config."""
    return family_of(config).architecture(config)


LLAMA3_8B_E8T2 = Recipe(
    name="llama3_8b_e8t2",
    dense="llama3_8b",
    # Stated by the paper: 8 experts, top-2, Mixtral-type router, capacity factor 4.
    upcycling=UpcyclingConfig(
        num_moe_experts=8,
        moe_router_topk=2,
        moe_router_pre_softmax=False,
        moe_expert_capacity_factor=4.0,
    ),
    # Stated: TP2 EP8 PP4 VPP8, expert-TP 1. CP 2 is Table 2's, whose rows with TP2 all have it.
    folding=ParallelFolding(
        tensor_model_parallel_size=2,
        context_parallel_size=2,
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=8,
        expert_model_parallel_size=8,
        expert_tensor_parallel_size=1,
    ),
    schedule=Schedule(
        # Chosen: the length that the paper counts its FLOPs at, and Llama 3's own.
        seq_length=8192,
        # Chosen: 4.2M tokens; arXiv 2410.07524 finds 4M better than 2M and 32M.
        global_batch_size=512,
        micro_batch_size=1,
        # Stated: 100B tokens = 23,842 steps of 512 · 8192.
        max_steps=-(-100_000_000_000 // (512 * 8192)),
        # Stated: 3e-5 → 3e-7, cosine, 100 warm-up steps.
        lr=3e-5,
        min_lr=3e-7,
        warmup_steps=100,
        val_check_interval=500,
        checkpoint_interval=500,
    ),
    # Stated: 512 H100.
    num_nodes=64,
    num_gpus_per_node=8,
)

# Chosen to learn something in minutes on two cores.
_TINY = Schedule(
    seq_length=256,
    global_batch_size=16,
    micro_batch_size=4,
    max_steps=250,
    lr=3e-3,
    min_lr=3e-4,
    warmup_steps=20,
    val_check_interval=50,
    checkpoint_interval=50,
)

LLAMA_TINY = Recipe(
    name="llama_tiny",
    dense="llama_tiny",
    upcycling=UpcyclingConfig(num_moe_experts=None),
    folding=ParallelFolding(),
    schedule=_TINY,
)

LLAMA_TINY_E8T2 = Recipe(
    name="llama_tiny_e8t2",
    dense="llama_tiny",
    upcycling=UpcyclingConfig(num_moe_experts=8, moe_router_topk=2),
    folding=ParallelFolding(),
    schedule=replace(_TINY, max_steps=100),
)

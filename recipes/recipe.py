"""A recipe as plain data: dense model, upcycling, folding, schedule."""

import json
import warnings
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_upcycle.checkpoint.described import Dense, architecture_here, dense_of_config
from nemo_upcycle.config import (
    PRECISIONS,
    RECOMPUTE,
    OptimizerStorage,
    ParallelFolding,
    UpcyclingConfig,
)
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture, architecture_of

CONFIGS = Path(__file__).parent / "configs"
OF_OPTIMIZER = tuple(field.name for field in fields(OptimizerStorage))
OF_RECIPE = ("num_nodes", "num_gpus_per_node", "precision", "recompute", *OF_OPTIMIZER)
OF_SCHEDULE = ("seq_length", "global_batch_size", "micro_batch_size")
"""Fields that are arguments of a recipe's factory."""


class AssumedModel(UserWarning):
    """A dense checkpoint is unreadable here; the recipe's own model is assumed instead."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a recipe trains. Lengths in tokens, batch sizes in sequences."""

    seq_length: int
    global_batch_size: int
    micro_batch_size: int
    train_tokens: int
    lr: float
    min_lr: float
    warmup_steps: int
    val_check_interval: int
    checkpoint_interval: int
    moe_health_interval: int = 50

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a global batch."""
        return self.seq_length * self.global_batch_size

    @property
    def max_steps(self) -> int:
        """Number of steps to see all tokens."""
        return -(-self.train_tokens // self.tokens_per_step)


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Attributes:
        name: The name for `--factory`.
        dense: Name of the dense model's Hugging Face config in `configs/`.
        upcycling: What the feed-forward layers become.
        folding: The parallel mapping.
        schedule: Tokens, batch sizes and learning rates.
        num_nodes: Number of nodes.
        num_gpus_per_node: GPUs per node.
        precision: A name of `config.PRECISIONS`.
        recompute: What the backward pass recomputes: a key of `config.RECOMPUTE`.
        optimizer_state: As in `OptimizerStorage`, like the two that follow.
        optimizer_offload_fraction: See there.
        grad_reduce_in_fp32: See there.
        checkpoint: The dense checkpoint's name on the hub.
        title: What the recipe does: a sentence.
        described: The dense model, if not one of `configs/`.
    """

    name: str
    dense: str
    upcycling: UpcyclingConfig
    folding: ParallelFolding
    schedule: Schedule
    num_nodes: int = 1
    num_gpus_per_node: int = 1
    precision: str = "bf16-mixed"
    recompute: str = "none"
    optimizer_state: str = "fp32"
    optimizer_offload_fraction: float = 0.0
    grad_reduce_in_fp32: bool = True
    checkpoint: str | None = None
    title: str = ""
    described: Dense | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.recompute not in RECOMPUTE:
            raise UpcyclingError(
                f"recompute is {self.recompute!r}; expected one of: {', '.join(RECOMPUTE)}."
            )
        if self.precision not in PRECISIONS:
            raise UpcyclingError(
                f"precision is {self.precision!r}; expected one of: {', '.join(PRECISIONS)}."
            )
        if self.recompute not in ("none", "full") and self.upcycling.num_moe_experts is None:
            raise UpcyclingError(
                f"recompute is {self.recompute!r}, but the model has no experts "
                "(num_moe_experts is None); use 'none' or 'full'."
            )
        if not (PRECISIONS[self.precision].has_savings or self.optimizer.is_default):
            raise UpcyclingError(
                f"The precision is {self.precision}, with {self.optimizer}; this is "
                f"supported only with bf16-mixed. Leave {', '.join(OF_OPTIMIZER)} out."
            )
        for name in OF_SCHEDULE:
            if getattr(self.schedule, name) < 1:
                raise UpcyclingError(
                    f"{name} is {getattr(self.schedule, name)}; expected 1 or more."
                )

    @property
    def optimizer(self) -> OptimizerStorage:
        """How Adam's state and the gradients are kept."""
        return OptimizerStorage(**{name: getattr(self, name) for name in OF_OPTIMIZER})

    @cached_property
    def config(self) -> dict[str, Any]:
        """The dense model's Hugging Face config, from the package."""
        return json.loads((CONFIGS / f"{self.dense}.json").read_text())

    @cached_property
    def architecture(self) -> Architecture:
        """The dense model's architecture."""
        return self.described.arch if self.described else architecture(self.config)

    @property
    def dense_model(self) -> Dense:
        """The dense model, without weights if the model is one of `configs/`."""
        return self.described or dense_of_config(
            self.config, self.dense, "the recipe's own config, no weights"
        )

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.num_nodes * self.num_gpus_per_node

    def on_ranks(self, world_size: int) -> "Recipe":
        """Return the recipe on another number of ranks: on one node, or on nodes of the same size.

        Raises:
            UpcyclingError: The ranks do not fill the nodes.
        """
        if world_size < 1:
            raise UpcyclingError(f"The world size is {world_size}; expected 1 or more.")
        if self.num_nodes == 1 or world_size < self.num_gpus_per_node:
            return replace(self, num_nodes=1, num_gpus_per_node=world_size)
        if world_size % self.num_gpus_per_node:
            raise UpcyclingError(
                f"{world_size} ranks do not fill nodes of num_gpus_per_node="
                f"{self.num_gpus_per_node}; use a multiple, or set num_gpus_per_node."
            )
        return replace(self, num_nodes=world_size // self.num_gpus_per_node)

    def architecture_of(self, dense_checkpoint: str | None) -> Architecture:
        """Return a dense checkpoint's architecture; if unreadable here, the recipe's own model's.

        A recipe can be made and planned without the checkpoint: on a login node, before a download.
        The recipe then warns about the assumption, and `UpcyclingCallback` compares on the ranks.

        Args:
            dense_checkpoint: A directory, a hub name in the local cache, or several; None for the
                recipe's own model.

        Raises:
            UpcyclingError: A source is no dense checkpoint, or the architectures differ.
        """
        if dense_checkpoint is None or self.described is not None:
            return self.architecture
        architecture, absent = architecture_here(dense_checkpoint)
        if absent and dense_checkpoint != self.checkpoint:
            shown = (
                "the others" if architecture else f"the recipe's own, {self.dense} ({self._size})"
            )
            warnings.warn(
                f"{', '.join(absent)} cannot be read on this machine: its architecture is taken "
                f"to be that of {shown}. If it is another, upcycling stops before anything is "
                "written; a run from scratch does not compare. Give a path or a name that can be "
                "read here to have the model made from it.",
                AssumedModel,
                stacklevel=2,
            )
        return architecture or self.architecture

    @property
    def _size(self) -> str:
        """The size of the recipe's own dense model, in words."""
        arch = self.architecture
        return (
            f"{arch.num_layers} layers, hidden_size {arch.hidden_size}, vocab_size "
            f"{arch.vocab_size}, rotary_base {arch.rotary_base:g}"
        )


def architecture(config: dict[str, Any]) -> Architecture:
    """Return the architecture of a parsed Hugging Face config."""
    return architecture_of(config)

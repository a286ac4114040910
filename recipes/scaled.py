"""The recipe `upcycle`, for any dense model: the papers' numbers, scaled to model and GPUs.

Stated by arXiv 2412.09952, for Llama 3 8B: learning rate 3e-5 → 3e-7, cosine, 100 warm-up steps,
100B tokens. Chosen here is how these numbers scale:

- Learning rate: inverse to the width. The peak of Llama 3's own pre-training is inverse to the
  width too: 3e-4, 1.5e-4 and 8e-5 for widths 4,096, 8,192 and 16,384 (arXiv 2407.21783, Table 3).
  The paper's 3e-5 is a tenth of that peak.
- Tokens: in proportion to the dense parameters, 12.5 per parameter, but at most the paper's.
- Batch: 4M tokens for 100B tokens, as arXiv 2410.07524 found best; with fewer tokens smaller by
  the square root, because the critical batch size grows with the data (arXiv 2410.21676).
- Warm-up: the paper's 100 steps, and at most a tenth of the training.
- Sequence: 8,192 tokens, for which the paper counts FLOPs, and at most the model's context.

A run on CPU is a trial: sequences of 512 tokens, 8 per step, fp32.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import log2, sqrt
from typing import Any

from nemo_upcycle_recipes.arguments import with_arguments
from nemo_upcycle_recipes.numbers import LLAMA3_8B_E8T2
from nemo_upcycle_recipes.recipe import OF_OPTIMIZER, Recipe, Schedule

from nemo_upcycle.checkpoint.described import Dense
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.planner.nodes import nodes_of

NAME = "upcycle"
"""The recipe's name for `--factory`."""

PAPER = LLAMA3_8B_E8T2
"""The recipe whose numbers are scaled."""

CHOSEN = (
    *("num_nodes", "num_gpus_per_node", "precision", "recompute", *OF_OPTIMIZER),
    *("seq_length", "global_batch_size", "micro_batch_size"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size"),
)
"""Arguments that the recipe chooses where they are None. Virtual stages are chosen where they are
not given, because None is a value of theirs."""

CPU_SEQ_LENGTH, CPU_BATCH, CPU_INTERVAL = 512, 8, 50


def scaled_recipe(
    dense: Dense,
    gpus: int,
    gpus_per_node: int,
    values: Mapping[str, Any],
    max_steps: int | None = None,
    on_cpu: bool = False,
) -> Recipe:
    """Return the recipe `upcycle` for a dense model, before a mapping is chosen.

    Args:
        dense: The dense model.
        gpus: Number of GPUs, or of ranks on CPU.
        gpus_per_node: The largest number of GPUs per node.
        values: Arguments of the factory by name, which replace the scaled numbers. An explicit
            `num_moe_experts` of None keeps the model dense.
        max_steps: Training steps, if other than the tokens give.
        on_cpu: Whether the run is a trial on CPU.

    Raises:
        UpcyclingError: A value is out of range or contradicts another.
    """
    is_dense = values.get("num_moe_experts", 8) is None
    nodes, per_node = nodes_of(gpus, gpus_per_node)
    recipe = Recipe(
        name=NAME,
        title="Upcycle any dense checkpoint.",
        dense=dense.source,
        described=dense,
        upcycling=UpcyclingConfig(num_moe_experts=None) if is_dense else UpcyclingConfig(),
        folding=ParallelFolding(),
        schedule=scaled_schedule(dense, gpus, values, max_steps, on_cpu),
        num_nodes=nodes,
        num_gpus_per_node=per_node,
        precision="32" if on_cpu else "bf16-mixed",
    )
    given = {"num_nodes", "num_gpus_per_node"} | ({"num_moe_experts"} if is_dense else set())
    return with_arguments(recipe, {k: v for k, v in values.items() if k not in given})


def scaled_schedule(
    dense: Dense,
    gpus: int,
    values: Mapping[str, Any],
    max_steps: int | None = None,
    on_cpu: bool = False,
) -> Schedule:
    """Return tokens, batch and learning rates for a dense model; see the module.

    Args:
        dense: The dense model.
        gpus: Number of GPUs; the batch is a multiple, if larger.
        values: Arguments of the factory by name: `seq_length` and `global_batch_size` count.
        max_steps: Training steps, if other than the tokens give.
        on_cpu: Whether the run is a trial on CPU.
    """
    paper, arch = PAPER.schedule, dense.arch
    longest = CPU_SEQ_LENGTH if on_cpu else paper.seq_length
    seq_length = values.get("seq_length", min(longest, arch.max_position_embeddings))
    share = min(1.0, dense.parameters / PAPER.dense_model.parameters)
    train_tokens = round(paper.train_tokens * share)
    batch = values.get("global_batch_size")
    if batch is None:
        batch = CPU_BATCH if on_cpu else scaled_batch(share, max(1, seq_length))
        batch = max(1, round(batch / gpus)) * gpus
    width = PAPER.architecture.hidden_size / arch.hidden_size
    schedule = replace(
        paper,
        seq_length=seq_length,
        global_batch_size=batch,
        train_tokens=train_tokens,
        lr=_rounded(paper.lr * width),
        min_lr=_rounded(paper.min_lr * width),
    )
    if on_cpu:
        schedule = replace(
            schedule,
            val_check_interval=CPU_INTERVAL,
            checkpoint_interval=CPU_INTERVAL,
            moe_health_interval=10,
        )
    if batch < 1 or seq_length < 1:  # refused by the recipe, with a better message
        return schedule
    steps = schedule.max_steps if max_steps is None else max_steps
    return replace(schedule, warmup_steps=min(paper.warmup_steps, steps // 10))


def scaled_batch(share: float, seq_length: int) -> int:
    """Return the sequences per step: the paper's tokens · √share, rounded to a power of two.

    Args:
        share: Tokens of the training, as a fraction of the paper's 100B.
        seq_length: Tokens per sequence.
    """
    return 2 ** max(0, round(log2(PAPER.schedule.tokens_per_step * sqrt(share) / seq_length)))


def _rounded(value: float) -> float:
    """Round to two digits: a learning rate is no exact science."""
    return float(f"{value:.2g}")


def why(recipe: Recipe, on_cpu: bool = False) -> list[str]:
    """Return the reasons for a recipe's numbers, one sentence each.

    Args:
        recipe: What `scaled_recipe` returned.
        on_cpu: Whether the run is a trial on CPU.
    """
    dense, schedule, paper = recipe.dense_model, recipe.schedule, PAPER.schedule
    width, share = dense.arch.hidden_size, schedule.train_tokens / paper.train_tokens
    tokens = f"{in_short(schedule.train_tokens)} tokens, {schedule.max_steps:,} steps"
    batch = f"{schedule.global_batch_size} sequences of {schedule.seq_length} per step"
    return [
        f"learning rate {schedule.lr:g} → {schedule.min_lr:g}: {paper.lr:g} → {paper.min_lr:g} of "
        f"arXiv 2412.09952 · {PAPER.architecture.hidden_size} / {width}, the widths",
        f"{tokens}, unless max_steps is given: the paper's 100B"
        + ("" if share == 1 else f" · {share:.2g}, the ratio of parameters"),
        f"{batch}: a trial on CPU"
        if on_cpu
        else f"{batch}, {in_short(schedule.tokens_per_step)} tokens: 4.2M · √{share:.2g}, rounded",
        f"{schedule.warmup_steps} warm-up steps: the paper's 100, at most a tenth of the steps",
    ]


def in_short(number: float) -> str:
    """Return a count with three digits and a unit: 8.03B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"

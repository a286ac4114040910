"""The factory `upcycle`: any dense checkpoint, on the GPUs that are there."""

import nemo_upcycle.nemo  # noqa: F401  checks versions, before NeMo is imported

# isort: split

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Optional

import nemo_run as run
import torch
from nemo.collections import llm
from nemo_upcycle_recipes import executors, factory, scaled
from nemo_upcycle_recipes.expectations import summary
from nemo_upcycle_recipes.on_host import on_host
from nemo_upcycle_recipes.recipe import Recipe
from nemo_upcycle_recipes.tuned import Tuned, tuned

from nemo_upcycle.checkpoint.described import Dense, open_dense, without_experts
from nemo_upcycle.engine.launch import fewest_ranks
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.planner.hardware import Hardware, device_hardware
from nemo_upcycle.planner.hardware import hardware as read_hardware
from nemo_upcycle.planner.nodes import with_nodes
from nemo_upcycle.planner.tuning import explain

OF_GPUS = ("num_nodes", "num_gpus_per_node")


@run.cli.factory(target=llm.pretrain, name=scaled.NAME)
@factory.takes_numbers_of(scaled.PAPER, chosen=scaled.CHOSEN, num_moe_experts=8)
def upcycle(
    dense_checkpoint: Optional[str] = None,
    dir: Optional[str] = None,
    name: str = scaled.NAME,
    tokenizer: Optional[str] = None,
    data_paths: Optional[str] = None,
    data_blend: Optional[str] = None,
    max_steps: Optional[int] = None,
    from_scratch: bool = False,
    read_once: bool = False,
    performance_mode: bool = False,
    cuda_graphs: bool = False,
    wandb_project: Optional[str] = None,
    router_warmup_steps: int = 0,
    export_every_n: Optional[int] = None,
    accelerator: str = "auto",
    hardware: Optional[str] = None,
    check_memory: bool = True,
    fn: Callable = llm.pretrain,
    **numbers: Any,
) -> run.Partial:
    """Upcycle any dense checkpoint on the GPUs that are there; without a GPU, a trial on CPU.

    The planner chooses mapping, microbatch and recompute, as `nemo-upcycle tune --dense DIR` does,
    and the reasons are printed. Learning rate, tokens and batch are those of arXiv 2412.09952,
    scaled to the model: learning rate 3e-5 · 4096 / hidden_size; 100B tokens · parameters / 8B, at
    most 100B; 4M tokens per step · the square root of that fraction; 100 warm-up steps, at most a
    tenth of the steps. A run that cannot fit is refused, with what would fit.

    With num_moe_experts=None the model stays dense: the control, on the same tokens.

    Args:
        dense_checkpoint: Directory, or a name in the local hub cache. Several, separated by
            semicolons, give experts from each.
        dir: Directory of runs.
        name: The run's name.
        tokenizer: Directory of the tokenizer; None takes the dense checkpoint's.
        data_paths: Megatron prefixes, separated by spaces, each with a weight before it if
            blended; quote a prefix with spaces. None takes NeMo's mock data.
        data_blend: Instead of `data_paths`: a blend's YAML, or `llama3_moe` for the paper's.
        max_steps: Training steps; None takes the scaled number of tokens.
        from_scratch: The same model from random weights.
        read_once: Read each slice of the dense checkpoint once per job and broadcast the slice.
        performance_mode: As in the other recipes.
        cuda_graphs: As in the other recipes.
        wandb_project: Project of Weights & Biases to log to, in addition to TensorBoard.
        router_warmup_steps: First steps in which only the routers are trained.
        export_every_n: Write a Hugging Face directory for every n-th checkpoint and the last.
        accelerator: `gpu`, `cpu`, or `auto`: the GPU if there is one, if the executor is Slurm
            with GPUs, or if `hardware`, num_nodes or num_gpus_per_node is given.
        hardware: The GPUs to plan for: h100, h200, a100, b200, gb200, or a YAML file. None takes
            this machine's GPU, or h100.
        check_memory: Refuse what the prediction says does not fit. False takes the planner's
            choice for GPUs with unlimited memory.
        fn: The function that the run calls.
        numbers: Fields of `UpcyclingConfig` and `ParallelFolding`, seq_length, global_batch_size,
            micro_batch_size, num_nodes, num_gpus_per_node, precision (bf16-mixed, fp8,
            mxfp8, 32), recompute (none, moe_act, norm_act, moe, full), optimizer_state (fp32,
            bf16, fp8: precision of Adam's moments), optimizer_offload_fraction (0 to 1:
            part of the optimizer on the CPUs), grad_reduce_in_fp32, and expansion_rate. What is
            not given is chosen. On CPU the executor's ranks count.

    Returns:
        The configuration.

    Examples:
        CLI usage:
            $ nemo llm pretrain --factory "upcycle(dense_checkpoint='/models/Qwen3-8B')" --dryrun
            $ nemo llm pretrain --yes \
                --factory "upcycle(dense_checkpoint='demo/dense_hf', num_moe_experts=4)"

        Python API usage:
            >>> recipe = upcycle(dense_checkpoint="/models/Qwen3-8B", num_nodes=8, hardware="h100")
    """
    if dense_checkpoint is None:
        raise UpcyclingError(
            "dense_checkpoint is not given; expected the dense model to upcycle: "
            "upcycle(dense_checkpoint='DIR')."
        )
    given = {name: value for name, value in numbers.items() if not _left_open(name, value)}
    given = executors.gpus() | given
    wants_gpus = hardware is not None or bool({*OF_GPUS} & {*given})
    if accelerator == "auto" and wants_gpus:
        accelerator = "gpu"
    moe = without_experts(dense_checkpoint) if from_scratch else None
    dense = moe or open_dense(dense_checkpoint)
    if factory.on_cpu(accelerator):
        chosen = _for_cpu(dense, given, max_steps, check_memory)
    else:
        chosen = _for_gpus(dense, given, hardware, max_steps, check_memory)
    return factory.pretrain(
        chosen,
        dir=dir,
        name=name,
        dense_checkpoint=dense_checkpoint,
        tokenizer=tokenizer,
        data_paths=data_paths,
        data_blend=data_blend,
        max_steps=max_steps,
        accelerator=accelerator,
        from_scratch=from_scratch,
        read_once=read_once,
        performance_mode=performance_mode,
        cuda_graphs=cuda_graphs,
        wandb_project=wandb_project,
        router_warmup_steps=router_warmup_steps,
        export_every_n=export_every_n,
        fn=fn,
    )


def _for_gpus(
    dense: Dense,
    given: dict[str, Any],
    named: str | None,
    max_steps: int | None,
    check_memory: bool,
) -> Recipe:
    """Return the recipe with the planner's mapping, and print the reasons."""
    hardware = _hardware(named)
    per_node = given.get("num_gpus_per_node", hardware.gpus_per_node)
    gpus = given.get("num_nodes", 1) * per_node
    recipe = scaled.scaled_recipe(dense, gpus, per_node, given, max_steps)
    if not check_memory:
        hardware = replace(hardware, memory_gib=1e6)
    found = tuned(recipe, given, gpus, hardware)
    _say(recipe, [*_reasons(found), *scaled.why(recipe)])
    return found.recipe


def _for_cpu(
    dense: Dense, given: dict[str, Any], max_steps: int | None, check_memory: bool
) -> Recipe:
    """Return the recipe for a trial on this machine's CPU, and print the reasons."""
    alone = scaled.scaled_recipe(dense, 1, 1, given, max_steps, on_cpu=True)
    ranks = executors.ranks() or fewest_ranks(alone.folding)
    recipe = scaled.scaled_recipe(dense, ranks, ranks, given, max_steps, on_cpu=True)
    chosen = on_host(recipe, given, check_memory)
    batch, recompute = chosen.schedule.micro_batch_size, chosen.recompute
    way = f"{chosen.folding} · microbatch {batch} · recompute {recompute}, on {ranks} CPU rank(s)"
    _say(chosen, [way, *scaled.why(chosen, on_cpu=True)])
    return chosen


def _left_open(name: str, value: Any) -> bool:
    """Return whether a value means that the recipe chooses; None can be a value too."""
    return value is None and name in scaled.CHOSEN


def _hardware(named: str | None) -> Hardware:
    """Return the named hardware, this machine's, or H100."""
    if named is not None:
        return read_hardware(named)
    if not torch.cuda.is_available():
        return read_hardware("h100")
    device = torch.cuda.get_device_properties(0)
    known = device_hardware(device.name)
    if known is None:
        _write(f"{device.name} is not known: the speed of H100 is assumed (hardware=FILE.yaml).")
    base = known or replace(read_hardware("h100"), name=device.name)
    here = replace(base, memory_gib=device.total_memory / 2**30)
    count = torch.cuda.device_count()
    if count > here.gpus_per_node:
        return replace(here, gpus_per_node=count)
    return with_nodes(here, count)


def _reasons(found: Tuned) -> list[str]:
    best = found.tuning.best[0]
    return [
        f"{best.mapping}: the fastest of {found.tuning.fitting:,} mappings that fit. "
        f"{summary(best)}",
        *explain(found.tuning),
    ]


def _say(recipe: Recipe, reasons: list[str]) -> None:
    """Print what was chosen, and why."""
    dense, label = recipe.dense_model, recipe.upcycling.label
    if recipe.upcycling.num_moe_experts is None:
        label = "the dense control"
    _write(f"{label} of {dense.source}, {scaled.in_short(dense.parameters)} parameters")
    for reason in reasons:
        _write(f"  {reason}")


def _write(line: str) -> None:
    print(f"[upcycle] {line}", file=sys.stderr)

"""The factory of every full-size recipe: one function, many numbers."""

import nemo_upcycle.nemo  # noqa: F401  checks versions, before NeMo is imported

# isort: split

from collections.abc import Callable
from typing import Any, Optional

import nemo_run as run
from nemo.collections import llm
from nemo_upcycle_recipes import expectations, factory
from nemo_upcycle_recipes.arguments import with_arguments
from nemo_upcycle_recipes.numbers import FULL_SIZE
from nemo_upcycle_recipes.recipe import Recipe

from nemo_upcycle.planner.hardware import hardware


def pretrain_recipe_of(recipe: Recipe) -> Callable[..., run.Partial]:
    """Return a recipe's factory, which `nemo llm pretrain --factory` finds by the recipe's name.

    Args:
        recipe: The recipe's numbers.
    """

    def pretrain_recipe(
        dir: Optional[str] = None,
        name: str = recipe.name,
        dense_checkpoint: Optional[str] = recipe.checkpoint,
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
        fn: Callable = llm.pretrain,
        **numbers: Any,
    ) -> run.Partial:
        return factory.pretrain(
            with_arguments(recipe, numbers),
            dir=dir,
            name=name,
            dense_checkpoint=dense_checkpoint,
            tokenizer=tokenizer,
            data_paths=data_paths,
            data_blend=data_blend,
            max_steps=max_steps,
            from_scratch=from_scratch,
            read_once=read_once,
            performance_mode=performance_mode,
            cuda_graphs=cuda_graphs,
            wandb_project=wandb_project,
            router_warmup_steps=router_warmup_steps,
            export_every_n=export_every_n,
            fn=fn,
        )

    pretrain_recipe.__doc__ = _doc(recipe)
    numbered = factory.takes_numbers_of(recipe)(pretrain_recipe)
    return run.cli.factory(target=llm.pretrain, name=recipe.name)(numbered)


def _doc(recipe: Recipe) -> str:
    expected = expectations.expected(recipe, hardware("h100"))
    return f"""{recipe.title}

    {recipe.folding}. {expectations.summary(expected)}

    Args:
        dir: Directory of runs.
        name: The run's name.
        dense_checkpoint: Directory, or a name in the local hub cache. Several, separated by
            semicolons, give experts from each.
        tokenizer: Directory of the tokenizer; None takes the dense checkpoint's.
        data_paths: Megatron prefixes, separated by spaces, each with a weight before it if
            blended; quote a prefix with spaces. None takes NeMo's mock data.
        data_blend: Instead of `data_paths`: a blend's YAML, or `llama3_moe` for the paper's.
        max_steps: Training steps; None means 100B tokens.
        from_scratch: The control: the same model from random weights.
        read_once: Read each slice of the dense checkpoint once per job and broadcast the slice.
        performance_mode: Overlap tensor-parallel collectives with matrix multiplications
            (Transformer Engine's user buffers); larger gradient buckets, manual garbage collection.
        cuda_graphs: Record each layer's kernels once and replay them: less work for the host. Needs
            experts padded to a capacity. Without MoE health metrics and fused weight gradients.
        wandb_project: Project of Weights & Biases to log to, in addition to TensorBoard.
        router_warmup_steps: First steps in which only the routers are trained.
        export_every_n: Write a Hugging Face directory for every n-th checkpoint and the last.
        fn: The function that the run calls.
        numbers: Fields of `UpcyclingConfig` and `ParallelFolding`, seq_length, global_batch_size,
            micro_batch_size, num_nodes, num_gpus_per_node, precision (bf16-mixed, fp8,
            mxfp8, 32), recompute (none, moe_act, norm_act, moe, full), optimizer_state (fp32,
            bf16, fp8: precision of Adam's moments), optimizer_offload_fraction (0 to 1:
            part of the optimizer on the CPUs), grad_reduce_in_fp32, and expansion_rate.

    Returns:
        The configuration.

    Examples:
        CLI usage:
            $ nemo llm pretrain --factory {recipe.name} --dryrun
            $ nemo llm pretrain --factory "{recipe.name}(num_nodes=4)" optim.config.lr=2e-5

        Python API usage:
            >>> from nemo_upcycle_recipes.upcycled import FACTORIES
            >>> recipe = FACTORIES["{recipe.name}"](dense_checkpoint="/models/dense")
    """


FACTORIES = {recipe.name: pretrain_recipe_of(recipe) for recipe in FULL_SIZE}
"""The factories, by the name for `--factory`."""

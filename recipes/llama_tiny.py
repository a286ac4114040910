"""A Llama of 1.1M parameters, dense and upcycled: the whole pipeline on a laptop's CPU."""

import nemo_upcycle.nemo  # noqa: F401  checks versions, before NeMo is imported

# isort: split

from collections.abc import Callable
from typing import Any, Optional

import nemo_run as run
from nemo.collections import llm
from nemo_upcycle_recipes import factory
from nemo_upcycle_recipes.arguments import with_arguments
from nemo_upcycle_recipes.numbers import LLAMA_TINY, LLAMA_TINY_E8T2
from nemo_upcycle_recipes.recipe import Recipe

from nemo_upcycle.data.paths import DataPath, text_of

DIR = "demo"


@run.cli.factory(target=llm.pretrain, name=LLAMA_TINY.name)
@factory.takes_numbers_of(LLAMA_TINY)
def dense_recipe(
    dir: str = DIR,
    name: str = "dense",
    dense_checkpoint: Optional[str] = None,
    tokenizer: Optional[str] = None,
    data_paths: Optional[str] = None,
    data_blend: Optional[str] = None,
    max_steps: Optional[int] = None,
    accelerator: str = "auto",
    fn: Callable = llm.pretrain,
    **numbers: Any,
) -> run.Partial:
    """Train a dense Llama of 1.1M parameters, from scratch or from a dense checkpoint.

    Args:
        dir: Directory of the demo: data, tokenizer and runs.
        name: The run's name.
        dense_checkpoint: Directory of the weights to start from, as a control of an upcycled run;
            None starts from scratch.
        tokenizer: Directory of the tokenizer; None takes the dense checkpoint's, or
            `dir/tokenizer` without one.
        data_paths: Megatron prefixes, separated by spaces, each with a weight before it; quote a
            prefix with spaces. None takes the demo's 7:3 blend.
        data_blend: A blend's YAML, instead of `data_paths`.
        max_steps: Training steps. As many steps as an upcycled run see the same tokens in the same
            order.
        accelerator: `auto`, `cpu` or `gpu`.
        fn: The function that the run calls.
        numbers: Fields of `ParallelFolding`, num_nodes, num_gpus_per_node (on CPU the executor's
            ranks count), precision (`32` or `bf16-mixed`).

    Returns:
        The configuration.

    Examples:
        CLI usage:
            $ nemo llm pretrain --factory llama_tiny --yes

        Python API usage:
            >>> recipe = dense_recipe(max_steps=10)
    """
    return _pretrain(
        with_arguments(LLAMA_TINY, numbers),
        dir=dir,
        name=name,
        dense_checkpoint=dense_checkpoint,
        tokenizer=tokenizer,
        data_paths=data_paths,
        data_blend=data_blend,
        max_steps=max_steps,
        accelerator=accelerator,
        fn=fn,
    )


@run.cli.factory(target=llm.pretrain, name=LLAMA_TINY_E8T2.name)
@factory.takes_numbers_of(LLAMA_TINY_E8T2)
def upcycled_recipe(
    dir: str = DIR,
    name: str = "e8t2",
    dense_checkpoint: Optional[str] = None,
    tokenizer: Optional[str] = None,
    data_paths: Optional[str] = None,
    data_blend: Optional[str] = None,
    max_steps: Optional[int] = None,
    from_scratch: bool = False,
    read_once: bool = False,
    router_warmup_steps: int = 0,
    export_every_n: Optional[int] = None,
    accelerator: str = "auto",
    fn: Callable = llm.pretrain,
    **numbers: Any,
) -> run.Partial:
    """Upcycle a tiny dense Llama into 8 experts, top-2, and train the MoE.

    Args:
        dir: Directory of the demo: data, tokenizer and runs.
        name: The run's name.
        dense_checkpoint: Directory to upcycle; None takes `dir/dense_hf`. Several, separated by
            semicolons, give experts from each.
        tokenizer: Directory of the tokenizer; None takes the dense checkpoint's.
        data_paths: Megatron prefixes, separated by spaces, each with a weight before it; quote a
            prefix with spaces. None takes the demo's 7:3 blend.
        data_blend: A blend's YAML, instead of `data_paths`.
        max_steps: Training steps.
        from_scratch: The control: the same MoE from random weights.
        read_once: Read each slice of the dense checkpoint once per job and broadcast the slice.
        router_warmup_steps: First steps in which only the routers are trained.
        export_every_n: Write a Hugging Face directory for every n-th checkpoint and the last.
        accelerator: `auto`, `cpu` or `gpu`.
        fn: The function that the run calls.
        numbers: Fields of `UpcyclingConfig` and `ParallelFolding`, num_nodes, num_gpus_per_node (on
            CPU the executor's ranks count), precision (`32` or `bf16-mixed`), and expansion_rate.

    Returns:
        The configuration.

    Examples:
        CLI usage:
            $ nemo llm pretrain --factory "llama_tiny_e8t2(expert_model_parallel_size=2)" \
                run.executor=cpu run.executor.ntasks_per_node=2 --yes
            $ nemo llm pretrain --yes \
                --factory "llama_tiny_e8t2(granularity=4, moe_router_topk=8, initializer='drop')"

        Python API usage:
            >>> recipe = upcycled_recipe(num_moe_experts=4)
    """
    return _pretrain(
        with_arguments(LLAMA_TINY_E8T2, numbers),
        dir=dir,
        name=name,
        dense_checkpoint=f"{dir}/dense_hf" if dense_checkpoint is None else dense_checkpoint,
        tokenizer=tokenizer,
        data_paths=data_paths,
        data_blend=data_blend,
        max_steps=max_steps,
        from_scratch=from_scratch,
        read_once=read_once,
        router_warmup_steps=router_warmup_steps,
        export_every_n=export_every_n,
        accelerator=accelerator,
        fn=fn,
    )


def _pretrain(
    recipe: Recipe,
    *,
    dir: str,
    dense_checkpoint: str | None,
    tokenizer: str | None,
    data_paths: str | None,
    data_blend: str | None,
    **options: Any,
) -> run.Partial:
    """Fill in defaults from the demo's directory."""
    demo = [DataPath(f"{dir}/data/documentation", 0.7), DataPath(f"{dir}/data/sources", 0.3)]
    if tokenizer is None and dense_checkpoint is None:
        tokenizer = f"{dir}/tokenizer"
    return factory.pretrain(
        recipe,
        dir=dir,
        dense_checkpoint=dense_checkpoint,
        tokenizer=tokenizer,
        data_paths=data_paths or (None if data_blend else text_of(demo)),
        data_blend=data_blend,
        **options,
    )

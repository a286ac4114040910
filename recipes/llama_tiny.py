"""A Llama of 2M parameters, dense and upcycled: the whole path on a laptop's CPU."""

from collections.abc import Callable
from typing import Any, Optional

import nemo_run as run
from nemo.collections import llm
from nemo_upcycle_recipes import factory
from nemo_upcycle_recipes.numbers import LLAMA_TINY, LLAMA_TINY_E8T2, Recipe, select

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig

DIR = "demo"


@run.cli.factory(target=llm.pretrain, name=LLAMA_TINY.name)
def dense_recipe(
    dir: str = DIR,
    name: str = "dense",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    dense_checkpoint: Optional[str] = None,
    tokenizer: Optional[str] = None,
    data_paths: Optional[str] = None,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: Optional[int] = None,
    context_parallel_size: int = 1,
    num_layers_in_first_pipeline_stage: Optional[int] = None,
    num_layers_in_last_pipeline_stage: Optional[int] = None,
    account_for_embedding_in_pipeline_split: bool = False,
    account_for_loss_in_pipeline_split: bool = False,
    max_steps: Optional[int] = None,
    accelerator: str = "auto",
    precision: str = "32",
    fn: Callable = llm.pretrain,
) -> run.Partial:
    """Train a dense Llama of 2M parameters, from scratch or on from a dense checkpoint.

    Args:
        dir: Directory of the demo: data, tokenizer and runs.
        name: The run's name.
        num_nodes: Nodes.
        num_gpus_per_node: GPUs a node; on CPU the executor's ranks count.
        dense_checkpoint: Hugging Face directory to train on from; None starts from scratch.
        tokenizer: Its directory; None takes the dense checkpoint's, else `dir/tokenizer`.
        data_paths: Megatron prefixes, weights before each, separated by spaces; None takes the
            demo's 7:3 blend.
        tensor_model_parallel_size: TP.
        pipeline_model_parallel_size: PP.
        virtual_pipeline_model_parallel_size: Virtual stages a pipeline stage.
        context_parallel_size: CP.
        num_layers_in_first_pipeline_stage: Layers of the first pipeline stage; None is its share.
        num_layers_in_last_pipeline_stage: Layers of the last pipeline stage; None is its share.
        account_for_embedding_in_pipeline_split: Count the embedding as a layer.
        account_for_loss_in_pipeline_split: Count the loss as a layer.
        max_steps: Steps.
        accelerator: `auto`, `cpu` or `gpu`.
        precision: `32` or `bf16-mixed`.
        fn: The function that the run calls.

    Returns:
        The configuration.

    Examples:
        CLI usage:
            $ nemo llm pretrain --factory llama_tiny --yes

        Python API usage:
            >>> recipe = dense_recipe(max_steps=10)
    """
    arguments = dict(locals())
    return _pretrain(
        LLAMA_TINY,
        upcycling=LLAMA_TINY.upcycling,
        folding=select(ParallelFolding, arguments),
        dir=dir,
        name=name,
        dense_checkpoint=dense_checkpoint,
        tokenizer=tokenizer,
        data_paths=data_paths,
        max_steps=max_steps,
        num_nodes=num_nodes,
        num_gpus_per_node=num_gpus_per_node,
        accelerator=accelerator,
        precision=precision,
        fn=fn,
    )


@run.cli.factory(target=llm.pretrain, name=LLAMA_TINY_E8T2.name)
def upcycled_recipe(
    dir: str = DIR,
    name: str = "e8t2",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    dense_checkpoint: Optional[str] = None,
    tokenizer: Optional[str] = None,
    data_paths: Optional[str] = None,
    num_moe_experts: int = 8,
    moe_router_topk: int = 2,
    moe_router_pre_softmax: bool = False,
    moe_expert_capacity_factor: Optional[float] = None,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: Optional[int] = None,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int = 1,
    num_layers_in_first_pipeline_stage: Optional[int] = None,
    num_layers_in_last_pipeline_stage: Optional[int] = None,
    account_for_embedding_in_pipeline_split: bool = False,
    account_for_loss_in_pipeline_split: bool = False,
    max_steps: Optional[int] = None,
    seed: int = 1234,
    read_once: bool = False,
    accelerator: str = "auto",
    precision: str = "32",
    fn: Callable = llm.pretrain,
) -> run.Partial:
    """Upcycle a tiny dense Llama into 8 experts, top-2, and train it on.

    Args:
        dir: Directory of the demo: data, tokenizer and runs.
        name: The run's name.
        num_nodes: Nodes.
        num_gpus_per_node: GPUs a node; on CPU the executor's ranks count.
        dense_checkpoint: Hugging Face directory to upcycle; None takes `dir/dense_hf`.
        tokenizer: Its directory; None takes the dense checkpoint's.
        data_paths: Megatron prefixes, weights before each, separated by spaces; None takes the
            demo's 7:3 blend.
        num_moe_experts: Experts a layer.
        moe_router_topk: Experts a token.
        moe_router_pre_softmax: Softmax before top-k (ST-type); not exact at step 0.
        moe_expert_capacity_factor: Capacity factor; None is dropless.
        tensor_model_parallel_size: TP of attention.
        pipeline_model_parallel_size: PP.
        virtual_pipeline_model_parallel_size: Virtual stages a pipeline stage.
        context_parallel_size: CP.
        expert_model_parallel_size: EP.
        expert_tensor_parallel_size: TP of each expert.
        num_layers_in_first_pipeline_stage: Layers of the first pipeline stage; None is its share.
        num_layers_in_last_pipeline_stage: Layers of the last pipeline stage; None is its share.
        account_for_embedding_in_pipeline_split: Count the embedding as a layer.
        account_for_loss_in_pipeline_split: Count the loss as a layer.
        max_steps: Steps.
        seed: Seed of the router.
        read_once: Read each slice of the dense checkpoint once a job and broadcast it.
        accelerator: `auto`, `cpu` or `gpu`.
        precision: `32` or `bf16-mixed`.
        fn: The function that the run calls.

    Returns:
        The configuration.

    Examples:
        CLI usage:
            $ nemo llm pretrain --factory "llama_tiny_e8t2(expert_model_parallel_size=2)" \
                run.executor=cpu run.executor.ntasks_per_node=2 --yes

        Python API usage:
            >>> recipe = upcycled_recipe(num_moe_experts=4)
    """
    arguments = dict(locals())
    return _pretrain(
        LLAMA_TINY_E8T2,
        upcycling=select(UpcyclingConfig, arguments),
        folding=select(ParallelFolding, arguments),
        dir=dir,
        name=name,
        dense_checkpoint=f"{dir}/dense_hf" if dense_checkpoint is None else dense_checkpoint,
        tokenizer=tokenizer,
        data_paths=data_paths,
        max_steps=max_steps,
        num_nodes=num_nodes,
        num_gpus_per_node=num_gpus_per_node,
        accelerator=accelerator,
        precision=precision,
        read_once=read_once,
        fn=fn,
    )


def _pretrain(
    recipe: Recipe,
    *,
    dir: str,
    dense_checkpoint: str | None,
    tokenizer: str | None,
    data_paths: str | None,
    **options: Any,
) -> run.Partial:
    """Fill in what the demo's directory gives."""
    documentation, sources = f"{dir}/data/documentation", f"{dir}/data/sources"
    if tokenizer is None and dense_checkpoint is None:
        tokenizer = f"{dir}/tokenizer"
    return factory.pretrain(
        recipe,
        dir=dir,
        dense_checkpoint=dense_checkpoint,
        tokenizer=tokenizer,
        data_paths=data_paths or f"0.7 {documentation} 0.3 {sources}",
        **options,
    )

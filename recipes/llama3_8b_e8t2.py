"""Llama 3 8B upcycled into 8 experts, top-2: the run of arXiv 2412.09952."""

from collections.abc import Callable
from typing import Optional

import nemo_run as run
from nemo.collections import llm
from nemo_upcycle_recipes import factory
from nemo_upcycle_recipes.numbers import LLAMA3_8B_E8T2, select

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig

NAME = LLAMA3_8B_E8T2.name
_UPCYCLING, _FOLDING = LLAMA3_8B_E8T2.upcycling, LLAMA3_8B_E8T2.folding


@run.cli.factory(target=llm.pretrain, name=NAME)
def pretrain_recipe(
    dir: Optional[str] = None,
    name: str = NAME,
    num_nodes: int = LLAMA3_8B_E8T2.num_nodes,
    num_gpus_per_node: int = LLAMA3_8B_E8T2.num_gpus_per_node,
    dense_checkpoint: str = "meta-llama/Meta-Llama-3-8B",
    tokenizer: Optional[str] = None,
    data_paths: Optional[str] = None,
    num_moe_experts: int = 8,
    moe_router_topk: int = _UPCYCLING.moe_router_topk,
    moe_router_pre_softmax: bool = _UPCYCLING.moe_router_pre_softmax,
    moe_expert_capacity_factor: Optional[float] = _UPCYCLING.moe_expert_capacity_factor,
    tensor_model_parallel_size: int = _FOLDING.tensor_model_parallel_size,
    pipeline_model_parallel_size: int = _FOLDING.pipeline_model_parallel_size,
    virtual_pipeline_model_parallel_size: Optional[
        int
    ] = _FOLDING.virtual_pipeline_model_parallel_size,
    context_parallel_size: int = _FOLDING.context_parallel_size,
    expert_model_parallel_size: int = _FOLDING.expert_model_parallel_size,
    expert_tensor_parallel_size: int = _FOLDING.expert_tensor_parallel_size,
    num_layers_in_first_pipeline_stage: Optional[int] = None,
    num_layers_in_last_pipeline_stage: Optional[int] = None,
    account_for_embedding_in_pipeline_split: bool = False,
    account_for_loss_in_pipeline_split: bool = False,
    max_steps: Optional[int] = None,
    seed: int = _UPCYCLING.seed,
    read_once: bool = False,
    fn: Callable = llm.pretrain,
) -> run.Partial:
    """Upcycle Llama 3 8B and train it on 100B tokens.

    8 experts, top-2, Mixtral-type router, capacity factor 4; TP2 CP2 EP8 ETP1 PP4 VPP8 on 512
    GPUs; bf16, distributed optimizer, 3e-5 → 3e-7 cosine. 47.49B parameters, 13.67B active.

    Args:
        dir: Directory of the runs.
        name: The run's name.
        num_nodes: Nodes.
        num_gpus_per_node: GPUs a node.
        dense_checkpoint: Hugging Face directory, or a name in the local hub cache.
        tokenizer: Its directory; None takes the dense checkpoint's.
        data_paths: Megatron prefixes, weights before each where blended, separated by spaces;
            None is NeMo's mock data.
        num_moe_experts: Experts a layer.
        moe_router_topk: Experts a token.
        moe_router_pre_softmax: Softmax before top-k (ST-type).
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
        max_steps: Steps; None is 100B tokens.
        seed: Seed of the router.
        read_once: Read each slice of the dense checkpoint once a job and broadcast it.
        fn: The function that the run calls.

    Returns:
        The configuration.

    Examples:
        CLI usage:
            $ nemo llm pretrain --factory llama3_8b_e8t2 --dryrun
            $ nemo llm pretrain --factory "llama3_8b_e8t2(num_nodes=16)" optim.config.lr=2e-5

        Python API usage:
            >>> recipe = pretrain_recipe(dense_checkpoint="/models/Meta-Llama-3-8B")
    """
    arguments = dict(locals())
    return factory.pretrain(
        LLAMA3_8B_E8T2,
        upcycling=select(UpcyclingConfig, arguments),
        folding=select(ParallelFolding, arguments),
        dir=dir,
        name=name,
        dense_checkpoint=dense_checkpoint,
        tokenizer=tokenizer,
        data_paths=data_paths,
        max_steps=max_steps,
        num_nodes=num_nodes,
        num_gpus_per_node=num_gpus_per_node,
        read_once=read_once,
        model_overrides={
            # Stated by the paper for the early steps, when routing is uneven: recompute the MoE
            # layers. Core attention costs little to recompute and saves the most.
            "recompute_granularity": "selective",
            "recompute_modules": ["core_attn", "moe"],
            "moe_grouped_gemm": True,
            "moe_permute_fusion": True,
        },
        fn=fn,
    )

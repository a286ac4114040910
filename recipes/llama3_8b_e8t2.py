"""Llama 3 8B upcycled into 8 experts, top-2: the run of arXiv 2412.09952, and its control."""

from collections.abc import Callable
from typing import Any, Optional

import nemo_run as run
from nemo.collections import llm
from nemo_upcycle_recipes import factory
from nemo_upcycle_recipes.numbers import LLAMA3_8B_DENSE, LLAMA3_8B_E8T2, with_arguments

NAME = LLAMA3_8B_E8T2.name
DENSE = "meta-llama/Meta-Llama-3-8B"


@run.cli.factory(target=llm.pretrain, name=NAME)
@factory.takes_numbers_of(LLAMA3_8B_E8T2)
def pretrain_recipe(
    dir: Optional[str] = None,
    name: str = NAME,
    dense_checkpoint: str = DENSE,
    tokenizer: Optional[str] = None,
    data_paths: Optional[str] = None,
    max_steps: Optional[int] = None,
    from_scratch: bool = False,
    read_once: bool = False,
    fn: Callable = llm.pretrain,
    **numbers: Any,
) -> run.Partial:
    """Upcycle Llama 3 8B and train it on 100B tokens.

    8 experts, top-2, Mixtral-type router, capacity factor 4; TP2 CP2 EP8 ETP1 PP4 VPP8 on 512
    GPUs; bf16, distributed optimizer, 3e-5 → 3e-7 cosine. 47.49B parameters, 13.67B active.

    Args:
        dir: Directory of the runs.
        name: The run's name.
        dense_checkpoint: Directory, or a name in the local hub cache; several, separated by
            semicolons, give experts from each.
        tokenizer: Its directory; None takes the dense checkpoint's.
        data_paths: Megatron prefixes, weights before each where blended, separated by spaces;
            None is NeMo's mock data.
        max_steps: Steps; None is 100B tokens.
        from_scratch: The control: the same MoE from random weights.
        read_once: Read each slice of the dense checkpoint once a job and broadcast it.
        fn: The function that the run calls.
        numbers: What the dense model becomes and how it is spread: fields of `UpcyclingConfig` and
            `ParallelFolding`, num_nodes, num_gpus_per_node, precision, and expansion_rate.

    Returns:
        The configuration.

    Examples:
        CLI usage:
            $ nemo llm pretrain --factory llama3_8b_e8t2 --dryrun
            $ nemo llm pretrain --factory "llama3_8b_e8t2(num_nodes=16)" optim.config.lr=2e-5
            $ nemo llm pretrain --factory "llama3_8b_e8t2(granularity=8, moe_router_topk=8)"

        Python API usage:
            >>> recipe = pretrain_recipe(dense_checkpoint="/models/Meta-Llama-3-8B")
    """
    return factory.pretrain(
        with_arguments(LLAMA3_8B_E8T2, numbers),
        dir=dir,
        name=name,
        dense_checkpoint=dense_checkpoint,
        tokenizer=tokenizer,
        data_paths=data_paths,
        max_steps=max_steps,
        from_scratch=from_scratch,
        read_once=read_once,
        model_overrides={
            # Core attention costs little to recompute and saves the most; the MoE layers are
            # stated by the paper for the early steps, when routing is uneven.
            "recompute_granularity": "selective",
            "recompute_modules": ["core_attn", "moe"],
            "moe_grouped_gemm": True,
            "moe_permute_fusion": True,
        },
        fn=fn,
    )


@run.cli.factory(target=llm.pretrain, name=LLAMA3_8B_DENSE.name)
@factory.takes_numbers_of(LLAMA3_8B_DENSE)
def dense_recipe(
    dir: Optional[str] = None,
    name: str = LLAMA3_8B_DENSE.name,
    dense_checkpoint: str = DENSE,
    tokenizer: Optional[str] = None,
    data_paths: Optional[str] = None,
    max_steps: Optional[int] = None,
    read_once: bool = False,
    fn: Callable = llm.pretrain,
    **numbers: Any,
) -> run.Partial:
    """Train Llama 3 8B on over the tokens of `llama3_8b_e8t2`, in the same order: its control.

    Args:
        dir: Directory of the runs.
        name: The run's name.
        dense_checkpoint: Directory, or a name in the local hub cache.
        tokenizer: Its directory; None takes the dense checkpoint's.
        data_paths: Megatron prefixes, weights before each where blended, separated by spaces;
            None is NeMo's mock data.
        max_steps: Steps; None is 100B tokens.
        read_once: Read each slice of the dense checkpoint once a job and broadcast it.
        fn: The function that the run calls.
        numbers: How it is spread: fields of `ParallelFolding`, num_nodes, num_gpus_per_node,
            precision.

    Returns:
        The configuration.

    Examples:
        CLI usage:
            $ nemo llm pretrain --factory llama3_8b_dense --dryrun

        Python API usage:
            >>> recipe = dense_recipe(dense_checkpoint="/models/Meta-Llama-3-8B")
    """
    return factory.pretrain(
        with_arguments(LLAMA3_8B_DENSE, numbers),
        dir=dir,
        name=name,
        dense_checkpoint=dense_checkpoint,
        tokenizer=tokenizer,
        data_paths=data_paths,
        max_steps=max_steps,
        read_once=read_once,
        model_overrides={
            "recompute_granularity": "selective",
            "recompute_modules": ["core_attn"],
        },
        fn=fn,
    )

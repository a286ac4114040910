"""Open any checkpoint as a model that computes logits, on all started ranks."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from transformers import PreTrainedModel

from nemo_upcycle.checkpoint import is_huggingface, read_config
from nemo_upcycle.checkpoint.run_directory import resolve_trained
from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.engine import cpu
from nemo_upcycle.engine.loadable import LoadableCheckpoint, open_loadable
from nemo_upcycle.engine.ranks import Ranks
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.evaluation.checks import dtype_of
from nemo_upcycle.evaluation.checks import open_tokenizer as open_tokenizer
from nemo_upcycle.evaluation.generation import generation_config
from nemo_upcycle.evaluation.megatron_model import MegatronForCausalLM
from nemo_upcycle.evaluation.transformers_model import is_fused, is_known, transformers_model
from nemo_upcycle.families import FAMILIES
from nemo_upcycle.families.model import upcycling_of
from nemo_upcycle.families.moe_config import MOE_FAMILIES
from nemo_upcycle.megatron.inference import inference_model
from nemo_upcycle.plans.layout import validate


def open_model(
    source: str | Path,
    folding: ParallelFolding | None = None,
    dtype: str | None = None,
    megatron: bool = False,
) -> PreTrainedModel:
    """Load a model for inference; every rank must call this.

    Checkpoints of NeMo 2, Megatron-LM and Megatron-Bridge, dense or MoE, run in Megatron. A Hugging
    Face directory runs in transformers on one rank, and in Megatron on several ranks. With
    transformers 5 an MoE runs in Megatron on one rank too.

    Args:
        source: The checkpoint, saved under any mapping.
        folding: Parallel mapping over the ranks that torchrun has started.
        dtype: `float32`, `bfloat16` or `float16`; None means the checkpoint's.
        megatron: Run a Hugging Face directory in Megatron even on one rank.

    Returns:
        A model with `forward` and `generate` as in transformers, to be called on all ranks.

    Raises:
        UpcyclingError: The checkpoint cannot be read, or does not fit the mapping.
    """
    folding, directory = folding or ParallelFolding(), resolve_trained(source)
    chosen = dtype_of(dtype)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    folding.validate(world_size)
    config = read_config(directory) if is_huggingface(directory) else None
    in_megatron = megatron or world_size > 1 or (config is not None and is_fused(config))
    if config is not None and in_megatron and not is_known(config):
        raise UpcyclingError(
            f"config.json says model_type={config.get('model_type')!r}, which Megatron does not "
            f"compute here; expected one of {', '.join((*FAMILIES, *MOE_FAMILIES))}. transformers "
            "runs others, on one rank: leave out --tp, --pp, --ep and --ranks."
        )
    if config is not None and not in_megatron:
        model = transformers_model(directory, chosen)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    else:
        _start(folding)
        opened = open_loadable(directory)
        model = _in_megatron(opened, folding, chosen or opened.dtype)
    model.generation_config = generation_config(directory)
    return model


def _start(folding: ParallelFolding) -> None:
    """Initialize torch.distributed and Megatron's process groups unless already initialized."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        cpu.enable()
    if not torch.distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        alone: dict[str, Any] = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
        torch.distributed.init_process_group(backend, **({} if "RANK" in os.environ else alone))
    if parallel_state.model_parallel_is_initialized():
        return
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=folding.tensor_model_parallel_size,
        pipeline_model_parallel_size=folding.pipeline_model_parallel_size,
        expert_model_parallel_size=folding.expert_model_parallel_size,
        expert_tensor_parallel_size=folding.expert_tensor_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)


def _in_megatron(
    source: LoadableCheckpoint, folding: ParallelFolding, dtype: torch.dtype
) -> MegatronForCausalLM:
    """Build and fill this rank's part of the model.

    Raises:
        UpcyclingError: Filling failed on any rank; raised on all ranks.
    """
    model = source.model
    if not any(model.is_moe):  # a dense model evaluated with the mapping of an MoE
        folding = replace(folding, expert_model_parallel_size=1, expert_tensor_parallel_size=1)
    world_size = torch.distributed.get_world_size()
    validate(model.arch, upcycling_of(model, model.arch.ffn_hidden_size), folding, world_size)
    chunk = inference_model(model, folding, dtype)
    ranks, filled, error = Ranks(), None, None
    try:
        filled = source.fill([chunk])
    except UpcyclingError as failed:
        error = failed
    ranks.raise_on_all(error)
    source.check(ranks.gather(filled))
    return MegatronForCausalLM([chunk], model.arch).eval()

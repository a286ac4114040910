"""Open any checkpoint as a model that computes logits, on as many ranks as there are."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from nemo_upcycle import cpu
from nemo_upcycle.checkpoint.huggingface import resolve_directory
from nemo_upcycle.checkpoint.tokenizer_files import NEEDED
from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.evaluation.megatron_model import MegatronForCausalLM
from nemo_upcycle.layout import validate
from nemo_upcycle.model import trained_config, upcycling_of
from nemo_upcycle.ranks import Ranks
from nemo_upcycle.source import Source, open_source
from nemo_upcycle.tokenizer import tokenizer_directory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_model(
    source: str | Path,
    folding: ParallelFolding | None = None,
    dtype: str | None = None,
    megatron: bool = False,
) -> PreTrainedModel:
    """Load a model for inference; every rank must call it.

    NeMo 2 and Megatron-LM checkpoints, dense or MoE, run in Megatron. A Hugging Face directory runs
    in transformers on one rank, and in Megatron on several.

    Args:
        source: The checkpoint, saved under any mapping.
        folding: How it is spread over the ranks that torchrun has started.
        dtype: `float32`, `bfloat16` or `float16`; None takes the checkpoint's.
        megatron: Run a Hugging Face directory in Megatron on one rank too.

    Returns:
        A model with transformers' `forward` and `generate`; calls on all ranks go together.

    Raises:
        UpcyclingError: It cannot be read, or not be spread so.
    """
    folding, directory = folding or ParallelFolding(), resolve_directory(source)
    if dtype not in (None, *DTYPES):
        raise UpcyclingError(f"dtype is {dtype!r}; expected one of: {', '.join(DTYPES)}.")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    folding.validate(world_size)
    is_huggingface = (directory / "config.json").is_file()
    if is_huggingface and world_size == 1 and not megatron:
        return _in_transformers(directory, dtype)
    _start(folding)
    found = open_source(directory)
    return _in_megatron(found, folding, found.dtype if dtype is None else DTYPES[dtype])


def open_tokenizer(*sources: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the first checkpoint that has one; nothing is executed.

    Raises:
        UpcyclingError: There is none.
    """
    found = next(filter(None, map(tokenizer_directory, sources)), None)
    if found is None:
        raise UpcyclingError(
            f"{sources[-1]} holds no tokenizer; expected one of {', '.join(NEEDED)}. "
            "Name its directory: --tokenizer DIR."
        )
    return AutoTokenizer.from_pretrained(found, trust_remote_code=False)


def is_first_rank() -> bool:
    """Say whether this process is rank 0, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def _in_transformers(directory: Path, dtype: str | None) -> PreTrainedModel:
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype or "auto", trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise UpcyclingError(f"transformers cannot load {directory}: {error}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _start(folding: ParallelFolding) -> None:
    """Start torch.distributed and Megatron's groups, if they are not there."""
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
    source: Source, folding: ParallelFolding, dtype: torch.dtype
) -> MegatronForCausalLM:
    """Build this rank's part and fill it.

    Raises:
        UpcyclingError: On all ranks, if any has failed.
    """
    model = source.model
    if not any(model.is_moe):  # beside an MoE whose mapping it shares
        folding = replace(folding, expert_model_parallel_size=1, expert_tensor_parallel_size=1)
    config = trained_config(
        model, dtype, **vars(folding), sequence_parallel=folding.sequence_parallel
    )
    world_size = torch.distributed.get_world_size()
    validate(model.arch, upcycling_of(config), folding, world_size)
    chunk = config.configure_model(tokenizer=None)
    if torch.cuda.is_available():
        chunk.cuda()
    ranks, filled, error = Ranks(), None, None
    try:
        filled = source.fill([chunk])
    except UpcyclingError as failed:
        error = failed
    ranks.raise_on_all(error)
    source.check(ranks.gather(filled))
    return MegatronForCausalLM([chunk], model.arch).eval()

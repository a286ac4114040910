"""Upcycle into a plain Megatron-Core model, without NeMo.

    python examples/without_nemo.py DENSE                       # one process
    torchrun --nproc-per-node 2 examples/without_nemo.py DENSE  # experts on two ranks

DENSE is a Hugging Face directory, or a model's name in the local hub cache. The script runs on CPU
over gloo if there is no GPU.
"""

import os
import sys
from dataclasses import fields
from types import SimpleNamespace

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig

from nemo_upcycle import ParallelFolding, UpcyclingConfig, open_dense, upcycle
from nemo_upcycle.engine import cpu
from nemo_upcycle.families.fields import architecture_fields, moe_fields

LLAMA = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False,
}
TOLD_TO_GPT_MODEL = {"vocab_size", "rotary_base", "share_embeddings_and_output_weights"}


def start(folding: ParallelFolding) -> None:
    """Initialize torch.distributed and Megatron's process groups."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        cpu.enable()
    alone = {} if "RANK" in os.environ else {"store": torch.distributed.HashStore(), "rank": 0}
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, **alone, **({"world_size": 1} if alone else {}))
    parallel_state.initialize_model_parallel(**folding.parallel_sizes)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


def build(dense: str, upcycling: UpcyclingConfig, folding: ParallelFolding) -> tuple:
    """Return this rank's part of the model with random weights, and the config for `upcycle`."""
    arch = open_dense(dense).arch
    said = LLAMA | architecture_fields(arch) | moe_fields(arch, upcycling) | folding.parallel_sizes
    if not torch.cuda.is_available():
        said |= cpu.MODEL_OVERRIDES
    of_megatron = {field.name for field in fields(TransformerConfig)}
    unknown = said.keys() - of_megatron - TOLD_TO_GPT_MODEL
    if unknown or not arch.gated_linear_unit:
        sys.exit(f"This example builds plain Llamas; {dense} also needs {sorted(unknown)}.")
    config = TransformerConfig(**{name: said[name] for name in said if name in of_megatron})
    spec = (
        get_gpt_decoder_block_spec(config, use_transformer_engine=True)
        if torch.cuda.is_available()
        else cpu.cpu_layer_spec(config)
    )
    model = GPTModel(
        config,
        spec,
        vocab_size=arch.vocab_size,
        max_sequence_length=arch.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=int(arch.rotary_base),
        share_embeddings_and_output_weights=arch.share_embeddings_and_output_weights,
    )
    # GPTModel has arguments beyond the fields of TransformerConfig.
    besides = {"seq_length": arch.max_position_embeddings, "make_vocab_size_divisible_by": 1}
    described = SimpleNamespace(**(vars(config) | said | besides))
    return model.cuda() if torch.cuda.is_available() else model, described


def main(dense: str) -> None:
    """Upcycle and print a report."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    folding = ParallelFolding(expert_model_parallel_size=ranks)
    start(folding)
    model, config = build(dense, UpcyclingConfig(num_moe_experts=8, moe_router_topk=2), folding)
    report = upcycle([model], config, dense)
    if torch.distributed.get_rank() == 0:
        print(report)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])

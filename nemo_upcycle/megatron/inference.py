"""A trained model as a Megatron-Core module, without a training library.

Works with every supported version of Megatron-Core, beside NeMo and without it.
"""

from dataclasses import fields as fields_of
from typing import Any

import torch
from megatron.core import parallel_state

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.engine.cpu import MODEL_OVERRIDES, cpu_layer_spec
from nemo_upcycle.families.fields import experts_fields
from nemo_upcycle.families.model import MoEModel
from nemo_upcycle.megatron.model import FinishModel, fields_of_architecture
from nemo_upcycle.plans.layout import padded_vocabulary


def inference_model(
    model: MoEModel, folding: ParallelFolding, dtype: torch.dtype
) -> torch.nn.Module:
    """Build this rank's part of a trained model, with weights that are not initialized.

    Megatron's process groups have to be there. No token is dropped, as in transformers. The model
    is on a GPU if there is one, else on CPU.

    Args:
        model: The trained model, dense or MoE.
        folding: The parallel mapping, without virtual stages.
        dtype: Of the parameters.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

    arch, on_gpu = model.arch, torch.cuda.is_available()
    length = arch.max_position_embeddings
    values: dict[str, Any] = {
        **fields_of_architecture(arch, seq_length=None),  # a text may be longer than the context
        **experts_fields(model),
        "moe_router_dtype": "fp32",  # routing decides by small differences
        "moe_token_dispatcher_type": "alltoall",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        **folding.strategy_arguments,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "perform_initialization": False,
        **({} if on_gpu else MODEL_OVERRIDES),
    }
    known = {field.name for field in fields_of(TransformerConfig)}
    config = TransformerConfig(**{name: values[name] for name in values.keys() & known})
    chunk = GPTModel(
        config=config,
        transformer_layer_spec=_layers(config, on_gpu),
        vocab_size=padded_vocabulary(arch.vocab_size, folding.tensor_model_parallel_size),
        max_sequence_length=length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=arch.share_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_percent=arch.rotary_percent,
        rotary_base=arch.rotary_base,
        seq_len_interpolation_factor=arch.seq_len_interpolation_factor,
    )
    FinishModel(arch, model.logit_normalization)([chunk])
    return chunk.cuda() if on_gpu else chunk


def _layers(config: Any, on_gpu: bool) -> Any:
    if not on_gpu:
        return cpu_layer_spec(config)
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    return get_gpt_decoder_block_spec(config, use_transformer_engine=True)

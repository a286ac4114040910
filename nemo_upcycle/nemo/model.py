"""The NeMo model: a dense model whose feed-forward layers became Mixture-of-Experts layers."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel as MCoreGPTModel
from nemo.collections.llm.fn.activation import squared_relu
from nemo.collections.llm.gpt.model.base import GPTModel, default_layer_spec
from nemo.collections.llm.gpt.model.llama import LlamaConfig
from nemo.lightning import io, teardown

from nemo_upcycle.checkpoint.beside import FIELD
from nemo_upcycle.checkpoint.kept import kept_of
from nemo_upcycle.checkpoint.tokenizer_directory import tokenizer_directory
from nemo_upcycle.engine.activations import gelu_tanh
from nemo_upcycle.engine.cpu import MODEL_OVERRIDES
from nemo_upcycle.engine.loadable import open_loadable
from nemo_upcycle.engine.model import (
    leave_padding_out,
    mark_experts,
    multiply,
    rope_frequencies,
    two_stages_fields,
)
from nemo_upcycle.engine.routers import set_up_routers
from nemo_upcycle.families import Architecture, fields
from nemo_upcycle.families.family import MULTIPLIERS
from nemo_upcycle.families.megatron import scaling_in
from nemo_upcycle.families.model import MoEModel
from nemo_upcycle.nemo import cpu
from nemo_upcycle.nemo.tokenizer import checkpoint_tokenizer
from nemo_upcycle.plans.layout import padded_vocabulary
from nemo_upcycle.trained.export import export


def layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Return the layer spec for Transformer Engine.

    If some layers stay dense, the spec is built block by block: NeMo's own has only one kind of
    layer.
    """
    if config.moe_layer_freq == 1:
        return default_layer_spec(config, vp_stage=vp_stage)
    return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)


@dataclass
class UpcycledGPTConfig(LlamaConfig):
    """A dense model with experts: attention, RoPE scaling and vocabulary are the dense model's.

    The fields are Megatron's and NeMo's, with the defaults of a Llama. Other families set different
    values (`architecture_fields`). `scale_factor`, `low_freq_factor`, `high_freq_factor` and
    `old_context_len` are Llama 3.1's RoPE scaling, as in NeMo's Llama31Config; with the `yarn_`
    fields, the scaling is YaRN. A `scale_factor` of None means no scaling. The multipliers are
    Granite's and Gemma's.

    With `num_moe_experts=None` this is the dense model.
    """

    num_moe_experts: int | None = 8
    moe_router_topk: int = 2
    moe_router_pre_softmax: bool = False
    moe_router_load_balancing_type: str = "aux_loss"
    # Best value in arXiv 2410.07524; arXiv 2412.09952 does not state a value.
    moe_aux_loss_coeff: float = 1e-2
    moe_token_dispatcher_type: str = "alltoall"
    # Small differences decide the routing; Megatron's default is the activations' dtype.
    moe_router_dtype: str | None = "fp32"
    moe_expert_capacity_factor: float | None = None
    transformer_layer_spec: Callable[..., Any] = layer_spec

    router_logit_normalization: float | None = None
    router_dense_gradient: bool = False
    vocab_size: int | None = None
    unpadded_vocab_size: int | None = field(default=None, init=False)
    scale_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    old_context_len: int = 8192
    yarn_beta_fast: float | None = None
    yarn_beta_slow: float | None = None
    yarn_correction_range_round_to_int: bool = True
    yarn_attention_factor: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    rounded_embedding_multiplier: float = 1.0

    def configure_model(
        self,
        tokenizer: Any,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> MCoreGPTModel:
        """Build this rank's Megatron-Core model."""
        self._pad_vocabulary()
        self._limit_capacity()
        stages = self.pipeline_model_parallel_size, self.virtual_pipeline_model_parallel_size
        for name, value in two_stages_fields(*stages).items():
            setattr(self, name, value)
        model = super().configure_model(tokenizer, pre_process, post_process, vp_stage)
        mark_experts(model)
        multiply(model, {name: getattr(self, name) for name in MULTIPLIERS})
        set_up_routers(model, self.router_logit_normalization, self.router_dense_gradient)
        if self.unpadded_vocab_size is not None and model.post_process:
            leave_padding_out(model, self.unpadded_vocab_size)
        if self.scale_factor is not None:
            rotated = int(self.kv_channels * self.rotary_percent)
            model.rotary_pos_emb.inv_freq = rope_frequencies(
                model, rotated, self.rotary_base, scaling_in(vars(self))
            )
        return model

    def _pad_vocabulary(self) -> None:
        """Pad the vocabulary to a multiple of TP, as Megatron requires; NeMo does not."""
        if self.unpadded_vocab_size is None:  # only once for all virtual stages
            self.unpadded_vocab_size = self.vocab_size
        if self.vocab_size is not None:
            self.vocab_size = padded_vocabulary(self.vocab_size, self.tensor_model_parallel_size)

    def _limit_capacity(self) -> None:
        """Limit the capacity factor to the value from which on no token is dropped.

        Megatron fails with a capacity above the number of tokens (NVIDIA/Megatron-LM#2214).
        """
        factor = self.moe_expert_capacity_factor
        if self.num_moe_experts is not None and factor is not None:
            # Slightly less, because the product with the number of tokens is rounded up.
            most = self.num_moe_experts / self.moe_router_topk * (1 - 1e-12)
            self.moe_expert_capacity_factor = min(factor, most)


class UpcycledGPTModel(GPTModel):
    """A dense model with experts, trained by NeMo.

    Args:
        config: The model's config; None if a checkpoint provides the config, as in
            `llm.import_ckpt`.
        optim: NeMo's optimizer module.
        tokenizer: NeMo's tokenizer.
        model_transform: See NeMo's GPTModel.
    """

    def __init__(
        self,
        config: UpcycledGPTConfig | None = None,
        optim: Any = None,
        tokenizer: Any = None,
        model_transform: Callable[[torch.nn.Module], torch.nn.Module] | None = None,
    ) -> None:
        super().__init__(config, optim, tokenizer, model_transform)


@io.model_exporter(UpcycledGPTModel, "hf")
class HuggingFaceExporter(io.ModelConnector):
    """The exporter behind `llm.export_ckpt(…, target="hf")`; see `nemo_upcycle.trained.export`."""

    def apply(self, output_path: Path) -> Path:
        """Write the checkpoint as a Hugging Face directory."""
        for note in export(str(self), output_path).notes:
            print(f"[export] {note}")
        return output_path


@io.model_importer(UpcycledGPTModel, "hf")
class HuggingFaceImporter(io.ModelConnector):
    """The importer behind `llm.import_ckpt(model, "hf://DIR")`, for exported MoEs and dense models.

    Only the class of the given model is used; the config comes from the directory.
    """

    def init(self) -> UpcycledGPTModel:
        """Make the model described by the directory, without weights."""
        source = open_loadable(str(self))
        config = trained_config(source.model, source.dtype)
        has_tokenizer = tokenizer_directory(str(self)) is not None
        return UpcycledGPTModel(
            config, tokenizer=checkpoint_tokenizer(str(self)) if has_tokenizer else None
        )

    def apply(self, output_path: Path) -> Path:
        """Write the directory as a NeMo 2 checkpoint."""
        source, model = open_loadable(str(self)), self.init()
        trainer = None
        if not torch.cuda.is_available():
            trainer = cpu.trainer(ckpt_save_optimizer=False, always_save_context=True)
        trainer = self.nemo_setup(model, trainer)
        source.check([source.fill([model.module])])
        trainer.callbacks.append(_Kept(kept_of(str(self))))
        self.nemo_save(output_path, trainer)
        teardown(trainer, model)
        return output_path


class _Kept(pl.Callback):
    """A callback that adds the directory's metadata to a checkpoint."""

    def __init__(self, kept: dict[str, Any]) -> None:
        self._kept = kept

    def state_dict(self) -> dict[str, Any]:
        return {FIELD: self._kept}


def architecture_fields(arch: Architecture) -> dict[str, Any]:
    """Return the fields of NeMo's configs that the dense model determines.

    Args:
        arch: The dense model's architecture.

    Returns:
        Keyword arguments for `UpcycledGPTConfig`. For a Llama also valid for NeMo's LlamaConfig, or
        Llama31Config with RoPE scaling. Values equal to a Llama's are omitted.
    """
    values = fields.architecture_fields(arch)
    for function in (squared_relu, gelu_tanh):
        if values.get("activation_func") == function.__name__:
            values["activation_func"] = function
    return values


def trained_config(model: MoEModel, dtype: torch.dtype, **others: Any) -> UpcycledGPTConfig:
    """Return the config of a trained model for this machine: on a GPU if there is one, else on CPU.

    Args:
        model: The trained model. No token is dropped, as in transformers.
        dtype: The parameters' dtype.
        others: Other fields, such as the parallel mapping.
    """
    arch, length = model.arch, model.arch.max_position_embeddings
    on_cpu = MODEL_OVERRIDES | {"transformer_layer_spec": cpu.cpu_layer_spec}
    of_model = architecture_fields(arch) | fields.window_fields(arch) | fields.experts_fields(model)
    return UpcycledGPTConfig(
        **(of_model if torch.cuda.is_available() else of_model | on_cpu),
        **others,
        seq_length=length,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        make_vocab_size_divisible_by=1,
        perform_initialization=False,
    )


def is_llama(arch: Architecture) -> bool:
    """Return whether NeMo's own Llama classes compute the dense model."""
    with_default = (each for each in fields_of(Architecture) if each.default is not MISSING)
    scaling = (arch.rope_scaling or {}).get("rope_type")
    return scaling in (None, "llama3") and all(
        getattr(arch, each.name) == each.default for each in with_default
    )

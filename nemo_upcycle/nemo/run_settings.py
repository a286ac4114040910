"""Settings that determine the result of a training, named as on the command line.

A run records its settings in its checkpoints. On a resume they are compared with the command's: a
change is either refused by name, or applied and reported. The parallel mapping, offloading of the
optimizer and options that only affect speed are not settings.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from nemo_upcycle.engine.run_settings import ROUTER_WARM_UP, changes
from nemo_upcycle.nemo.router_warm_up import RouterWarmUp

Settings = dict[str, Any]

_ARCHITECTURE = (
    *("activation_func", "activation_func_clamp_value", "add_bias_linear", "add_qkv_bias"),
    *("apply_query_key_layer_scaling", "apply_residual_connection_post_layernorm"),
    *("ffn_hidden_size", "gated_linear_unit", "glu_linear_offset", "hidden_size"),
    *("high_freq_factor", "kv_channels", "layernorm_epsilon"),
    *("layernorm_zero_centered_gamma", "low_freq_factor", "moe_apply_probs_on_input"),
    *("moe_ffn_hidden_size", "moe_layer_freq", "moe_router_enable_expert_bias"),
    *("moe_router_group_topk", "moe_router_num_groups", "moe_router_pre_softmax"),
    *("moe_router_score_function", "moe_router_topk", "moe_router_topk_scaling_factor"),
    *("moe_shared_expert_intermediate_size", "mtp_num_layers", "multi_latent_attention"),
    *("no_rope_freq", "normalization", "num_attention_heads", "num_layers"),
    *("num_moe_experts", "num_query_groups", "old_context_len", "position_embedding_type"),
    *("qk_layernorm", "rotary_base", "rotary_interleaved", "rotary_percent"),
    *("router_logit_normalization", "scale_factor", "seq_len_interpolation_factor"),
    *("share_embeddings_and_output_weights", "softmax_scale", "softmax_type", "vocab_size"),
    *("window_attn_skip_freq", "window_size", "yarn_attention_factor", "yarn_beta_fast"),
    *("yarn_beta_slow", "yarn_correction_range_round_to_int"),
    *("embedding_multiplier", "logits_scaling", "residual_multiplier"),
    "rounded_embedding_multiplier",
)
"""Fields of the model's config that determine the function computed by the weights."""

_REFUSED = frozenset(
    {"data.seq_length", "data.tokenizer"}
    | {ROUTER_WARM_UP}
    | {"optim.config.optimizer", "optim.config.use_distributed_optimizer"}
    | {f"model.config.{name}" for name in _ARCHITECTURE}
)

# Fields for parallel mapping, kernels and initialization. Fields in no list are settings that may
# change.
_NO_SETTING = re.compile(
    "parallel|comm|p2p|overlap|recompute|offload|cuda_graph|fusion|fused|pipeline|microbatch|wgrad|"
    "timers|_func$|grouped_gemm|rng|transformer_engine|^use_|_te_|_spec$|init|deepep|logg|"
    "deallocate|barrier|generation|step_fn|test_mode|persist|memory_efficient|inference|flash|"
    "divisible|scatter|attention_backend|dtype|autocast|deterministic|^bf16|^fp16|^seq_length$|"
    "moe_layer_recompute|mlp_chunks|^_|mamba|heterogeneous|hetereogenous|cp_comm|meta_device"
)
_OF_DATA = (
    *("seq_length", "micro_batch_size", "seed", "split", "num_train_samples", "dataloader_type"),
    *("dataset_cls", "reset_position_ids", "reset_attention_mask", "eod_mask_loss"),
)
_OF_OPTIMIZER = (
    *("optimizer", "lr", "decoupled_lr", "decoupled_min_lr", "weight_decay", "clip_grad"),
    "use_distributed_optimizer",
    *("adam_beta1", "adam_beta2", "adam_eps", "decoupled_weight_decay", "sgd_momentum"),
    *("exp_avg_dtype", "exp_avg_sq_dtype", "main_grads_dtype"),
)
_SAMPLE_BYTES = 2**16


def settings_of(trainer: pl.Trainer, module: pl.LightningModule) -> Settings:
    """Return the settings that determine the result of a training.

    Args:
        trainer: The trainer, with its data.
        module: NeMo's model, with its config and optimizer.

    Returns:
        Plain values by name, which a checkpoint can store.
    """
    settings: Settings = {"trainer.max_steps": trainer.max_steps}
    settings |= _of_plugins(trainer) | _of_optimizer(getattr(module, "optim", None))
    warm_ups = [each.steps for each in trainer.callbacks if isinstance(each, RouterWarmUp)]
    settings[ROUTER_WARM_UP] = sum(warm_ups)
    settings |= _of_data(getattr(trainer, "datamodule", None))
    return settings | _of_config(getattr(module, "config", None))


def compare(before: Mapping[str, Any], now: Mapping[str, Any], run: str) -> list[str]:
    """Compare the settings of a run with those of the command that resumes the run.

    Args:
        before: Settings in the run's checkpoint.
        now: Settings of the command.
        run: Path of the run, for the error message.

    Returns:
        The changes, one line each.

    Raises:
        UpcyclingError: A setting has changed that is fixed for a run.
    """
    return changes(before, now, run, _REFUSED)


def _of_plugins(trainer: pl.Trainer) -> Settings:
    precision = getattr(trainer.precision_plugin, "precision", None)
    return {"trainer.plugins.precision": str(precision)}


def _of_optimizer(optim: Any) -> Settings:
    config, scheduler = getattr(optim, "config", None), getattr(optim, "lr_scheduler", None)
    settings = {
        f"optim.config.{name}": _plain(getattr(config, name))
        for name in _OF_OPTIMIZER
        if hasattr(config, name)
    }
    if scheduler is not None:
        settings["optim.lr_scheduler"] = type(scheduler).__name__
        # NeMo sets max_steps to the trainer's; `monitor` is for other schedulers.
        settings |= {
            f"optim.lr_scheduler.{name}": value
            for name, value in vars(scheduler).items()
            if not name.startswith("_")
            and name not in ("max_steps", "monitor")
            and _is_plain(value)
        }
    return settings


def _of_data(data: Any) -> Settings:
    settings = {
        f"data.{name}": _plain(getattr(data, name)) for name in _OF_DATA if hasattr(data, name)
    }
    settings["data"] = type(data).__name__
    sources = getattr(data, "build_kwargs", {})
    blends = [sources["blend"]] if "blend" in sources else sources.get("blend_per_split") or []
    settings["data.paths"] = [
        [None if weights is None else float(weights[index]), str(prefix), _content(str(prefix))]
        for prefixes, weights in filter(None, blends)
        for index, prefix in enumerate(prefixes)
    ]
    settings["data.tokenizer"] = _of_tokenizer(getattr(data, "tokenizer", None))
    return settings


def _of_tokenizer(tokenizer: Any) -> str | None:
    """Return a fingerprint of a tokenizer's vocabulary: training sees only ids."""
    vocabulary = getattr(tokenizer, "vocab", None)
    if vocabulary is None:
        return None
    tokens = vocabulary.items() if isinstance(vocabulary, Mapping) else enumerate(vocabulary)
    digest = hashlib.sha256(repr(sorted(map(str, tokens))).encode()).hexdigest()
    return f"{len(vocabulary)} tokens, end {getattr(tokenizer, 'eos_id', None)}, {digest[:16]}"


def _of_config(config: Any) -> Settings:
    if config is None:
        return {}
    settings = {}
    for name in (field.name for field in fields(config)):
        value = getattr(config, name, None)
        if name in _ARCHITECTURE or (_is_plain(value) and not _NO_SETTING.search(name)):
            settings[f"model.config.{name}"] = _plain(value)
    return settings


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | tuple)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, torch.dtype):
        return str(value)
    return value if _is_plain(value) else getattr(value, "__name__", type(value).__name__)


def _content(prefix: str) -> str | None:
    """Return a fingerprint of a dataset's files: sizes, first and last bytes.

    Paths do not count: a directory may move between two starts.
    """
    digest = hashlib.sha256()
    for path in (Path(f"{prefix}.idx"), Path(f"{prefix}.bin")):
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                for start in (0, max(0, size - _SAMPLE_BYTES)):
                    file.seek(start)
                    digest.update(b"%d:" % size + file.read(_SAMPLE_BYTES))
        except OSError:
            return None
    return digest.hexdigest()[:16]

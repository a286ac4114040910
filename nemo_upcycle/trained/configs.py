"""Configs and tokenizer of an exported MoE, taken from the dense model's files."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_upcycle.checkpoint.dtypes import DTYPE_NAMES
from nemo_upcycle.checkpoint.kept import CHAT_TEMPLATES, CONFIG, default_tokens
from nemo_upcycle.checkpoint.tokenizer_files import copy_tokenizer
from nemo_upcycle.families.family import ACTIVATIONS
from nemo_upcycle.families.model import MoEModel
from nemo_upcycle.families.moe_family import MoEFamily

_TOKENIZERS = {
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "mixtral": "LlamaTokenizer",
    "phi3": "LlamaTokenizer",
    "granite": "GPT2Tokenizer",
    "granitemoe": "GPT2Tokenizer",
    "granitemoeshared": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "glm4_moe": "PreTrainedTokenizerFast",
}
"""Tokenizer classes that transformers uses by model type if a tokenizer's files name none."""


def write_configs(
    model: MoEModel,
    family: MoEFamily,
    dtype: str,
    kept: Mapping[str, Any] | None,
    tokenizer_files: Path | None,
    directory: Path,
) -> list[str]:
    """Write config.json, generation_config.json and the tokenizer.

    Args:
        model: The MoE.
        family: The architecture of transformers.
        dtype: dtype of the weights, by safetensors' name.
        kept: The record of the dense model's configs; see `checkpoint.kept`.
        tokenizer_files: Directory of the tokenizer; None if there is none.
        directory: Output directory.

    Returns:
        Notes for the user: assumptions and contradictions.
    """
    config, generation = config_of(model, family, dtype), None
    tokenizer = _copy_tokenizer(tokenizer_files, directory)
    if kept is not None and "config" in kept:
        config |= _of_dense(kept, family.model_type, directory)
        generation = kept.get("generation_config")
        _write_chat_templates(kept.get("chat_templates") or {}, directory)
    elif tokenizer is not None:
        ids = {name: value for name, value in _ids(tokenizer).items() if value is not None}
        config |= ids
        generation = {"_from_model_config": True, **ids}
    write_json(directory / "config.json", config)
    if generation is not None:
        write_json(directory / "generation_config.json", generation)
    notes = list(_assumed(model, tokenizer, kept))
    if tokenizer is not None:
        notes += _contradictions(tokenizer, config, generation or {})
    return notes


def write_grown_configs(source: Path, config: Mapping[str, Any], directory: Path) -> None:
    """Write config.json, and copy generation_config.json, tokenizer and chat templates.

    Args:
        source: Directory of an MoE.
        config: The `config.json`.
        directory: Output directory.
    """
    write_json(directory / "config.json", config)
    copy_tokenizer(source, directory)
    if (source / "generation_config.json").is_file():
        shutil.copy(source / "generation_config.json", directory)
    if (source / CHAT_TEMPLATES).is_dir():
        shutil.copytree(source / CHAT_TEMPLATES, directory / CHAT_TEMPLATES)


def config_of(model: MoEModel, family: MoEFamily, dtype: str) -> dict[str, Any]:
    """Return the `config.json` of a trained MoE, readable by transformers 4 and 5."""
    arch = model.arch
    rope: dict[str, Any] | None = None
    if arch.rope_scaling is not None:
        rope = dict(arch.rope_scaling)
    elif arch.seq_len_interpolation_factor is not None:
        rope = {"rope_type": "linear", "factor": arch.seq_len_interpolation_factor}
    return {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_query_groups,
        "hidden_act": ACTIVATIONS[arch.activation].words[0],
        "max_position_embeddings": arch.max_position_embeddings,
        "initializer_range": arch.init_method_std,
        "rms_norm_eps": arch.layernorm_epsilon,
        "rope_theta": arch.rotary_base,
        "rope_scaling": rope,
        "tie_word_embeddings": arch.share_embeddings_and_output_weights,
        "torch_dtype": DTYPE_NAMES[dtype],
        **family.config(model),
    }


def _of_dense(kept: Mapping[str, Any], model_type: str, directory: Path) -> dict[str, Any]:
    """Return settings of the dense model's config.json, or transformers' defaults."""
    kind, said = str(kept.get("model_type")), kept["config"]
    now = default_tokens(model_type)
    unsaid = {name: value for name, value in default_tokens(kind).items() if value != now[name]}
    config = {**unsaid, **said}
    if not config.get("tokenizer_class") and _TOKENIZERS.get(kind) != _TOKENIZERS[model_type]:
        path = directory / "tokenizer_config.json"
        named = json.loads(path.read_text()) if path.is_file() else {}
        if kind in _TOKENIZERS and not named.get("tokenizer_class"):
            config["tokenizer_class"] = _TOKENIZERS[kind]
    return {name: config[name] for name in CONFIG if name in config}


def _copy_tokenizer(source: Path | None, directory: Path) -> Any:
    """Copy the tokenizer's files unchanged; return the tokenizer, None if none can be loaded."""
    if source is None:
        return None
    copy_tokenizer(source, directory)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception:  # files of another version can raise anything; the files are copied anyway
        return None


def _write_chat_templates(templates: Mapping[str, str], directory: Path) -> None:
    for name, template in templates.items():
        path = directory / CHAT_TEMPLATES / Path(name).name
        path.parent.mkdir(exist_ok=True)
        path.write_text(template)


def _ids(tokenizer: Any) -> dict[str, int | None]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}


def _assumed(model: MoEModel, tokenizer: Any, kept: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield settings that were not recorded, and the assumed values."""
    tokens = "no token ids are said" if tokenizer is None else "token ids are the tokenizer's"
    if kept is None:
        window = "" if model.arch.sliding_window else "there is no sliding window, "
        yield (
            "the checkpoint has no record of the dense model's configs (it was saved by an older "
            "version or another program): max_position_embeddings is the run's "
            f"{model.arch.max_position_embeddings}, {window}{tokens}. Correct config.json if the "
            "dense model's values differ"
        )
    elif "config" not in kept:
        yield f"the dense checkpoint was Megatron's, which stores no token ids: {tokens}"


def _contradictions(
    tokenizer: Any, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> Iterator[str]:
    """Yield contradictions between the tokens of the tokenizer and of the configs."""
    files = {"config.json": config, "generation_config.json": generation}
    for name, own in _ids(tokenizer).items():
        said = {
            file: values[name] for file, values in files.items() if values.get(name) is not None
        }
        others = {file: value for file, value in said.items() if own not in _listed(value)}
        if own is not None and others:
            named = dict.fromkeys(_named(tokenizer, value) for value in others.values())
            yield (
                f"the tokenizer's {name} is {_named(tokenizer, own)}, that of "
                f"{' and '.join(others)} {' and '.join(named)}: each is kept as the dense model "
                "has it"
            )


def _named(tokenizer: Any, ids: Any) -> str:
    return ", ".join(f"{one} ({tokenizer.convert_ids_to_tokens(one)})" for one in _listed(ids))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def write_json(path: Path, value: Any) -> None:
    """Write JSON as transformers does."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

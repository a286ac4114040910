"""Text generation: stop tokens and the continuation of a prompt."""

import json
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from nemo_upcycle.checkpoint import gguf_in, is_huggingface, read_config
from nemo_upcycle.checkpoint.kept import GENERATION, default_tokens, kept_of
from nemo_upcycle.checkpoint.tokenizer_files import check_token_ids
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import FAMILIES
from nemo_upcycle.families.config_words import in_words_of_transformers_4
from nemo_upcycle.families.defaults import DEFAULTS
from nemo_upcycle.families.moe_config import MOE_FAMILIES
from nemo_upcycle.trained.opened import open_trained

FILE = "generation_config.json"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NUMBERS = (
    *("max_length", "min_length", "num_beams", "temperature", "top_k", "top_p", "typical_p"),
    *("repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
)
_READ_BESIDE = ("rope_scaling", "head_dim", *_TOKENS, *GENERATION)
"""Config keys that are read in addition to the keys with a default of the family."""

_RUNNING = (
    *("return_dict", "output_hidden_states", "output_attentions", "torchscript", "use_cache"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "gradient_checkpointing"),
)
"""Keys that change how a model runs but not the result; these are decided here."""


def generation_config(directory: Path) -> GenerationConfig:
    """Return a checkpoint's generation config, in particular all eos ids.

    Args:
        directory: The checkpoint. Without `generation_config.json` the model's config counts, as in
            transformers. For NeMo's checkpoints the recorded config of the dense model counts.

    Raises:
        UpcyclingError: A file cannot be read.
    """
    if (directory / FILE).is_file():
        try:
            said = json.loads((directory / FILE).read_text())
            _check(said, directory / FILE)
            return GenerationConfig.from_dict(said)
        except UpcyclingError:
            raise
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UpcyclingError(
                f"{directory / FILE} cannot be read: {error}; expected the JSON that transformers "
                "writes."
            ) from error
    if is_huggingface(directory):
        _check(read_config(directory), directory / "config.json")
        return GenerationConfig.from_model_config(transformers_config(directory))
    kept = kept_of(directory) if gguf_in(directory) else open_trained(directory).kept or {}
    if saved := kept.get("generation_config"):
        _check(saved, directory)
        return GenerationConfig.from_dict(dict(saved))
    said = default_tokens(str(kept.get("model_type"))) | dict(kept.get("config", {}))
    _check(said, directory)
    return GenerationConfig(**{name: said.get(name) for name in _TOKENS})


def _check(said: Mapping[str, Any], path: Path) -> None:
    """Check types that transformers accepts unchecked and that would fail during generation.

    Raises:
        UpcyclingError: A value has the wrong type.
    """
    for key in _TOKENS:
        check_token_ids(said.get(key), key, path)
    for key in _NUMBERS:
        value = said.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UpcyclingError(f"{path} says {key}={value!r}; expected a number, or null.")


def transformers_config(directory: Path) -> PretrainedConfig:
    """Return the transformers config of a Hugging Face directory.

    The installed transformers is version 4: keys of version 5 are translated.

    Raises:
        UpcyclingError: The config cannot be read, or has no equivalent in transformers 4.
    """
    config = read_config(directory)
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UpcyclingError(
            f"config.json says model_type={kind!r}, which transformers {transformers.__version__} "
            "does not know."
        )
    if kind not in (*FAMILIES, *MOE_FAMILIES):
        config = _of_another_family(config)
    else:
        words = in_words_of_transformers_4(config)
        read = {*DEFAULTS[kind], *_READ_BESIDE}
        config = {key: value for key, value in words.items() if key in read}
    config = {key: value for key, value in config.items() if key not in _RUNNING}
    try:
        return CONFIG_MAPPING[kind].from_dict(config)
    except Exception as error:  # raised by the code of any of some hundred families
        said = " ".join(str(error).split())
        raise UpcyclingError(
            f"transformers cannot read {directory / 'config.json'}: {type(error).__name__}: {said}"
        ) from error


def _of_another_family(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a family that only transformers computes, in version 4's keys.

    Raises:
        UpcyclingError: The family's config in transformers 4 has no key for a RoPE parameter.
    """
    rope = config.get("rope_parameters")
    if not rope:
        return config
    words = in_words_of_transformers_4(config)
    known = signature(CONFIG_MAPPING[config["model_type"]].__init__).parameters
    unread = [word for word in rope if word in words and word not in known]
    if words.get("rope_scaling") and "rope_scaling" not in known:
        unread.append("rope_scaling")
    if unread:
        raise UpcyclingError(
            f"config.json is transformers 5's: rope_parameters={rope}. transformers "
            f"{transformers.__version__} has no {', '.join(unread)} in a {config['model_type']}; "
            "save the model with transformers 4."
        )
    return words


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, context_length: int | None
) -> list[int]:
    """Return the token ids of a prompt.

    Args:
        tokenizer: The model's tokenizer.
        prompt: The text.
        context_length: Maximum number of tokens per row; None if unknown.

    Raises:
        UpcyclingError: The prompt has no token, or leaves no room for a further token.
    """
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    if not ids:
        raise UpcyclingError("The prompt is empty; expected a text to go on from.")
    if context_length is not None and len(ids) >= context_length:
        raise UpcyclingError(
            f"The prompt has {len(ids)} tokens; expected fewer than the model's context length, "
            f"{context_length}. Give a shorter one."
        )
    return ids


def go_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 1234,
) -> str:
    """Return a prompt with the model's continuation; every rank must call this.

    Generation stops at the eos ids in `generation_config`, else at the tokenizer's eos token. Other
    settings in the checkpoint's generation config, such as penalties and top-p, are ignored.

    Args:
        model: The model.
        tokenizer: The model's tokenizer.
        ids: The prompt's token ids.
        max_new_tokens: Maximum number of generated tokens.
        temperature: Sampling temperature; 0 takes the most likely token.
        seed: Seed for a temperature above 0.
    """
    stops = model.generation_config.eos_token_id
    stops = tokenizer.eos_token_id if stops is None else stops
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature}
    prompt = torch.tensor([ids], device=model.device)
    # transformers fills what is not set here from the model's own config.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens,
                eos_token_id=stops,
                # A single row needs no padding, but transformers warns without a pad token.
                pad_token_id=stops[0] if isinstance(stops, list) else stops,
                **sampling,
            ),
        )
    finally:
        model.generation_config = own
    return tokenizer.decode(output[0], skip_special_tokens=True)

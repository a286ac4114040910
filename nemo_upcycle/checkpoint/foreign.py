"""Recognize directories that are not dense checkpoints: what they hold, and what to do."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.checkpoint.tokenizer_files import NEEDED
from nemo_upcycle.errors import UpcyclingError, listing
from nemo_upcycle.families import FAMILIES
from nemo_upcycle.families.moe_config import MOE_FAMILIES


@dataclass(frozen=True)
class _Kind:
    """A kind of file that dense checkpoints are not read from."""

    names: str
    what: str
    way_out: str


_KINDS = (
    _Kind(
        r"adapter_(config\.json|model\..+)",
        "an adapter (PEFT), which changes a base model that is elsewhere ({names})",
        "Merge the two (PEFT's merge_and_unload), save_pretrained, and give that directory.",
    ),
    _Kind(
        r"model-\d+-of-\d+\.safetensors",
        "shards without model.safetensors.index.json, which says what belongs together ({names})",
        "Copy the index too.",
    ),
    _Kind(
        r"model\.(?!safetensors)[^.]+\.safetensors|model\.[^.]+-\d+-of-\d+\.safetensors"
        r"|model\.safetensors\.index\..+\.json",
        "a variant of the weights alone ({names})",
        "Load it with from_pretrained(..., variant=...) and save_pretrained it without one.",
    ),
    _Kind(
        r"consolidated.*\.(safetensors|pth)",
        "weights under Mistral's or Meta's own names ({names})",
        "Get the model in Hugging Face's format, or convert it with transformers' "
        "convert_*_weights_to_hf.py.",
    ),
    _Kind(
        r".+\.gguf",
        "GGUF, llama.cpp's format, quantized as a rule ({names})",
        "Get the original weights; or, for a Llama or Qwen, `pip install gguf` and give the file "
        "in a directory without config.json; or load the file with "
        "from_pretrained(..., gguf_file=...), which dequantizes it, and save_pretrained that.",
    ),
    _Kind(
        r"global_step\d+|zero_to_fp32\.py|.*zero_pp_rank_.+",
        "DeepSpeed's own checkpoint ({names})",
        "Run `python zero_to_fp32.py . OUT --safe_serialization` in it.",
    ),
    _Kind(
        r"(?!training_args|optimizer|scheduler|scaler|rng_state|random_states).+\.(bin|pt|pth|ckpt)",
        "pickled weights ({names}), which can run code when loaded",
        "Convert it with save_pretrained(..., safe_serialization=True).",
    ),
    _Kind(r".+\.onnx", "an ONNX graph ({names})", "Get the model that it was exported from."),
    _Kind(
        r"tf_model.*|.+\.h5|model\.ckpt.*\.index",
        "TensorFlow's weights ({names})",
        "Load it with from_pretrained(..., from_tf=True) and save_pretrained it.",
    ),
    _Kind(
        r"flax_model.*|.+\.msgpack",
        "Flax's weights ({names})",
        "Load it with from_pretrained(..., from_flax=True) and save_pretrained it.",
    ),
    _Kind(r".+\.npz", "MLX's or NumPy's weights ({names})", "Get the original weights."),
    _Kind(
        r".+\.safetensors",
        "files of other names ({names}), which transformers does not read",
        "If one is the whole model, name it model.safetensors.",
    ),
)
_SNAPSHOT = re.compile(r"models--(?P<name>[^/]+)/snapshots/[^/]+$")
_CACHED_MODEL = re.compile(r"models--(?P<name>[^/]+)$")
_PARTS = ("text_config", "llm_config", "language_config", "vision_config", "audio_config")
"""Config keys of the parts of a multi-part model."""


def get_again(directory: Path) -> str:
    """Return how to get the missing files of a directory."""
    match = _SNAPSHOT.search(str(directory))
    if match is None:
        return "Get the checkpoint again."
    name = _hub_name(match)
    return f"Not all of the model was downloaded; `hf download {name}` gets the rest."


def _hub_name(match: re.Match[str]) -> str:
    """Return a model's hub name from its directory in the hub's cache."""
    return match["name"].replace("--", "/", 1)


def _snapshots(directory: Path) -> tuple[str, str] | None:
    """Recognize a model's directory in the hub's cache; return what it is and what to give."""
    snapshots = sorted(directory.glob("snapshots/*/"))
    if not snapshots or not {"refs", "blobs"} & {path.name for path in directory.iterdir()}:
        return None
    match = _CACHED_MODEL.search(str(directory.resolve()))
    named = f", or the model's name, {_hub_name(match)}" if match else ""
    what = "a model of the hub's cache, whose files are under snapshots/"
    return what, f"Give {' or '.join(map(str, snapshots[:3]))}{named}."


def held_instead(directory: Path) -> tuple[str, str] | None:
    """Return what a directory without a dense checkpoint's weights holds, and what to do.

    Args:
        directory: The directory.

    Returns:
        Both as text; None if nothing is recognized.
    """
    entries = {path.name: path for path in directory.iterdir()}
    dangling = [name for name, path in entries.items() if path.is_symlink() and not path.exists()]
    if any(name.endswith((".safetensors", ".json")) for name in dangling):
        return f"links to files that are not there ({listing(dangling)})", get_again(directory)
    if cached := _snapshots(directory):
        return cached
    weights = {"model.safetensors", "model.safetensors.index.json"} & entries.keys()
    if weights and "config.json" not in entries:
        return "weights without what they are", "Copy the config.json that belongs to them too."
    for kind in _KINDS:
        names = [name for name in entries if re.fullmatch(kind.names, name)]
        if names:
            return kind.what.format(names=listing(names)), kind.way_out
    inside = [name for name, path in entries.items() if (path / "config.json").is_file()]
    if inside:
        return f"directories that are checkpoints ({listing(inside)})", "Give one of these."
    if _SNAPSHOT.search(str(directory)):
        return "a part of the model's files", get_again(directory)
    if any(name in entries for name in NEEDED):
        return "a tokenizer and no model", "Give the directory of the model's weights."
    return None


def no_checkpoint(directory: Path) -> UpcyclingError:
    """Return the error for a directory that is no checkpoint of any format."""
    what, way_out = held_instead(directory) or ("nothing that is known", "Check the path.")
    return UpcyclingError(
        f"{directory} is no checkpoint: it holds {what}; expected config.json and *.safetensors, "
        f"or what NeMo 2 or Megatron-LM saves. {way_out}"
    )


def check_no_adapter(directory: Path) -> None:
    """Check that there is no adapter beside the weights, which transformers would apply.

    Raises:
        UpcyclingError: There is an adapter.
    """
    if (directory / "adapter_config.json").is_file():
        adapter = _KINDS[0]
        raise UpcyclingError(
            f"{directory} holds {adapter.what.format(names='adapter_config.json')}; expected a "
            f"dense model's weights alone. {adapter.way_out}"
        )


def _way_on(kind: object, directory: Path) -> str:
    """Return how an MoE is trained further, or made larger; empty if neither can be done."""
    if str(kind) not in MOE_FAMILIES:
        return ""
    return (
        f" For more experts, run `nemo-upcycle upcycle {directory} LARGER --experts N`. To train "
        "an MoE on, run `nemo llm import model=upcycled_gpt source=hf://MOE output_path=NEMO`, and "
        "give the recipe dense_checkpoint=MOE, from_scratch=True, the MoE's experts, and "
        "'resume.restore_config=weights(path=NEMO)'."
    )


def check_dense(config: Mapping[str, Any], directory: Path) -> None:
    """Check that a config describes neither an MoE nor a model of several parts.

    `family_of` refuses all other unknown models.

    Raises:
        UpcyclingError: The config describes an MoE or a model of several parts.
    """
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in FAMILIES:
        return
    parts = [name for name in _PARTS if isinstance(config.get(name), Mapping)]
    experts = {
        name: count
        for part in (config, *(config[name] for name in parts))
        for name, count in part.items()
        if re.fullmatch(r"(\w+_)?experts", str(name)) and isinstance(count, int) and count > 1
    }
    if experts or "moe" in str(kind):
        said = "".join(f", {name}={count}" for name, count in experts.items())
        raise UpcyclingError(
            f"{directory} is an MoE already (config.json says model_type={kind!r}{said}); expected "
            "a dense checkpoint. Give the original dense model." + _way_on(kind, directory)
        )
    if parts:
        raise UpcyclingError(
            f"{directory} is a model of several parts (config.json says model_type={kind!r} and "
            f"has {', '.join(parts)}); expected a language model alone. Load the model with "
            "transformers, save its language model with save_pretrained, and give that directory."
        )

"""Quantized weights in a Hugging Face directory: dequantized while reading, or refused by name.

FP8 is dequantized (`fp8.py`). A quantization config over plain weights is left over from a merge or
a conversion: the weights are read, as transformers does where it can.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_upcycle.checkpoint.dense import Entry
from nemo_upcycle.checkpoint.dtypes import DTYPE_BYTES, dtype_called
from nemo_upcycle.checkpoint.fp8 import (
    WEIGHT,
    ScaledWeight,
    Scheme,
    scaled_weights,
    scheme_of,
)
from nemo_upcycle.errors import UpcyclingError, listing

KEYS = ("quantization_config", "compression_config")
"""Keys of config.json that describe a quantization; the second is that of older checkpoints."""

_TENSORS = {
    r"\.(weight_scale_inv|weight_scale|input_scale|activation_scale)": "FP8",
    r"\.biases": "MLX",
    r"\.(qweight|qzeros|scales|g_idx)": "GPTQ or AWQ",
    r"\.(SCB|(weight\.)?(nested_)?(absmax|quant_map)|(weight\.)?quant_state\..+)": "bitsandbytes",
    r"\.weight_(packed|shape|zero_point|global_scale)": "compressed-tensors",
    r"\.(W_q|W_q\..+)": "HQQ",
    r"\.(codes|codebooks)": "AQLM",
    r"\.weight\._(data|scale|shift)": "quanto",
    r"\.weight_scales": "EETQ",
    r"\.(weight:.+|_?weight_qdata|_weight_.+)": "torchao",
    r"\.weight_scale_2": "ModelOpt",
    r"\.(centroids|indices)(\.weight)?": "VPTQ",
    r"_(blocks|scales)": "MXFP4",
}
"""Endings of names of tensors that belong to quantized weights."""

_CHANGES_THE_MODEL = ("bitnet", "fp_quant", "fouroversix", "sinq", "higgs", "quark")
"""Methods whose models compute something else than their weights, even if these are plain."""

_SELF_DEQUANTIZED = ("bitsandbytes", "higgs")
"""Methods whose models have a working `dequantize()` in transformers 4."""


@dataclass(frozen=True)
class Quantization:
    """What a config.json says of a quantization.

    Attributes:
        key: The key in config.json.
        method: The method, or `a method that it does not name`.
        settings: The value of the key.
    """

    key: str
    method: str
    settings: Mapping[str, Any]

    def scheme(self, where: str) -> Scheme | None:
        """Return how weights are stored in FP8; None if they are not.

        Raises:
            UpcyclingError: The settings are not the method's, or change what the model computes.
        """
        try:
            if self.method in _CHANGES_THE_MODEL or self._transforms():
                raise refused(where, f"{self.method} (its {self.key})", self.method)
            return scheme_of(self.method, self.settings)
        except UpcyclingError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, re.error) as error:
            raise UpcyclingError(
                f"The {self.key} of {where} cannot be read as {self.method}: {error!r}. "
                "Get the config.json that belongs to the checkpoint."
            ) from error

    def _transforms(self) -> bool:
        """Return whether compressed-tensors rotates activations, or leaves zeros out of files."""
        sparsity = self.settings.get("sparsity_config") or {}
        transforms = self.settings.get("transform_config") or {}
        return bool(transforms.get("config_groups")) or sparsity.get("format", "dense") != "dense"


def quantization_of(config: Mapping[str, Any]) -> Quantization | None:
    """Return what a config says of a quantization; None if nothing."""
    key = next((key for key in KEYS if config.get(key)), None)
    if key is None:
        return None
    said = config[key] if isinstance(config[key], Mapping) else {}
    method = said.get("quant_method")
    if method is None and any(said.get(name) for name in ("load_in_4bit", "load_in_8bit")):
        method = "bitsandbytes"
    return Quantization(key, str(method or "a method that it does not name"), said)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the dequantized model."""
    return {key: value for key, value in config.items() if key not in KEYS}


def check_known(quantization: Quantization | None, where: str) -> None:
    """Check, without weights, that weights of a quantization could be read.

    Raises:
        UpcyclingError: They could not.
    """
    if quantization is not None and quantization.scheme(where) is None:
        raise refused(where, f"{quantization.method} (its {quantization.key})", quantization.method)


def dequantized(
    entries: Mapping[str, Entry],
    quantization: Quantization | None,
    config: Mapping[str, Any],
    where: str,
) -> tuple[dict[str, Entry], dict[str, ScaledWeight]]:
    """Return the tensors of the dequantized model.

    Args:
        entries: The stored tensors.
        quantization: What the config says.
        config: The config, whose dtype dequantized weights get; BF16 without one.
        where: Name of the checkpoint, for errors.

    Returns:
        The tensors without scales, and the weights that have scales.

    Raises:
        UpcyclingError: Weights are quantized in another way than FP8, or scales do not fit.
    """
    scheme = quantization.scheme(where) if quantization is not None else None
    scaled: dict[str, ScaledWeight] = {}
    if scheme is not None and any(info.dtype == WEIGHT for info, _ in entries.values()):
        dtype = dtype_called(config.get("dtype") or config.get("torch_dtype")) or "BF16"
        entries, scaled = scaled_weights(entries, scheme, dtype, where)
    _check_plain(entries, quantization, where)
    return dict(entries), scaled


def _check_plain(
    entries: Mapping[str, Entry], quantization: Quantization | None, where: str
) -> None:
    """Check that the remaining tensors are not quantized.

    Raises:
        UpcyclingError: Some are, by their names; or by their dtypes, if the config names a method.
    """
    by_config = f"{quantization.method} (its {quantization.key}" if quantization else None
    for ending, method in _TENSORS.items():
        found = [name for name in entries if re.search(f"{ending}$", name)]
        if found:
            by = f"{by_config}; it has" if by_config else f"{method} (it has"
            name = quantization.method if quantization else method
            raise refused(where, f"{by} {listing(found, 3)})", name)
    odd = [
        f"{name} in {e[0].dtype}" for name, e in entries.items() if e[0].dtype not in DTYPE_BYTES
    ]
    if quantization and odd:
        raise refused(where, f"{by_config}; it has {listing(odd, 3)})", quantization.method)


def refused(where: str, by: str, method: str) -> UpcyclingError:
    """Return the error for weights that are not read."""
    way = "Give the original checkpoint"
    if method in _SELF_DEQUANTIZED:
        way += "; or load this one with from_pretrained, call the model's dequantize(), and save "
        way += "the model with save_pretrained"
    return UpcyclingError(
        f"{where} is quantized by {by}; expected weights in F32, BF16 or F16, or in FP8 with "
        f"scales. {way}."
    )

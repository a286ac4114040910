"""Names and layouts of dense checkpoints mapped to Megatron's, declared once per family."""

from typing import Any

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.family import Architecture, Family, Operation, Rows, dimensions
from nemo_upcycle.families.gemma import GEMMA
from nemo_upcycle.families.granite import GRANITE
from nemo_upcycle.families.llama import LLAMA
from nemo_upcycle.families.megatron import MODEL_TYPE
from nemo_upcycle.families.megatron_names import dense_family
from nemo_upcycle.families.mistral import MISTRAL
from nemo_upcycle.families.nemotron import NEMOTRON
from nemo_upcycle.families.phi3 import PHI3
from nemo_upcycle.families.qwen2 import QWEN2
from nemo_upcycle.families.qwen3 import QWEN3
from nemo_upcycle.families.smollm3 import SMOLLM3
from nemo_upcycle.families.stablelm import STABLELM
from nemo_upcycle.families.unfit import DENSE, feature_of

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(LLAMA, MISTRAL, QWEN2, QWEN3, NEMOTRON, SMOLLM3, PHI3),
        *(GRANITE, GEMMA, STABLELM),
    )
}


def family_of(config: dict[str, Any]) -> Family:
    """Return the family of a dense checkpoint's config.

    Args:
        config: The parsed `config.json`; or Megatron's fields, with the model type `megatron`.

    Raises:
        UpcyclingError: The family is not one that can be upcycled.
    """
    model_type = config.get("model_type")
    if model_type == MODEL_TYPE:
        return dense_family(config, FAMILIES.values())
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UpcyclingError(
            f"config.json says model_type={model_type!r}; "
            f"families that can be upcycled: {', '.join(FAMILIES)}." + feature_of(model_type, DENSE)
        )
    return FAMILIES[model_type]


def architecture_of(config: dict[str, Any]) -> Architecture:
    """Return the architecture of a dense model.

    Args:
        config: The parsed `config.json`, in the format of transformers 4 or 5; or Megatron's
            fields.

    Raises:
        UpcyclingError: The model cannot be upcycled.
    """
    return family_of(config).architecture(config)


__all__ = [
    "FAMILIES",
    "Architecture",
    "Family",
    "Operation",
    "Rows",
    "architecture_of",
    "dimensions",
    "family_of",
]

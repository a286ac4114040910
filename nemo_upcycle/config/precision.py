"""Training precisions: the parameters' dtype, and Megatron's fields for FP8."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Precision:
    """A training precision.

    Attributes:
        dtype: The parameters' and activations' dtype, in the words of safetensors.
        fields: Fields of Megatron's config for products in FP8; parameters stay in `dtype`.
    """

    dtype: str
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def is_bf16(self) -> bool:
        """Whether parameters are in bf16, with fp32 copies in the optimizer."""
        return self.dtype == "BF16"

    @property
    def is_fp8(self) -> bool:
        """Whether matrix products are in FP8."""
        return bool(self.fields)

    @property
    def has_savings(self) -> bool:
        """Whether Adam's state may be kept in less precision or on the host."""
        return self.is_bf16 and not self.is_fp8


PRECISIONS = {
    "bf16-mixed": Precision("BF16"),
    # One scale per tensor, computed from the tensor itself; Hopper and later.
    "fp8": Precision(
        "BF16",
        {
            "fp8": "hybrid",
            "fp8_recipe": "tensorwise",
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": 1,
            "num_layers_at_end_in_bf16": 1,
        },
    ),
    # One scale per 32 values; Blackwell.
    "mxfp8": Precision("BF16", {"fp8": "e4m3", "fp8_recipe": "mxfp8"}),
    "32": Precision("F32"),
}
"""Training precisions by the name that recipes take."""

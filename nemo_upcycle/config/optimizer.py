"""How Adam's state and the gradients are kept: precision, and on which processor."""

from dataclasses import dataclass

from nemo_upcycle.errors import UpcyclingError

OPTIMIZER_STATE: dict[str, int] = {"fp32": 4, "bf16": 2, "fp8": 1}
"""Precisions of Adam's two moments, and the bytes of one value; the most precise first."""


@dataclass(frozen=True)
class OptimizerStorage:
    """How Adam's state and the gradients are kept.

    Whatever is chosen, Adam updates an fp32 copy of the parameters.

    Attributes:
        optimizer_state: Precision of Adam's moments: a key of `OPTIMIZER_STATE`. Other than fp32
            needs Megatron's precision-aware optimizer and Transformer Engine.
        optimizer_offload_fraction: Fraction of Adam's state that is in the host's memory. The
            CPUs update this fraction.
        grad_reduce_in_fp32: Whether gradients are accumulated and reduced in fp32, or in bf16.

    Raises:
        UpcyclingError: A value is out of range, or offloaded moments are to be other than fp32.
    """

    optimizer_state: str = "fp32"
    optimizer_offload_fraction: float = 0.0
    grad_reduce_in_fp32: bool = True

    def __post_init__(self) -> None:
        if self.optimizer_state not in OPTIMIZER_STATE:
            raise UpcyclingError(
                f"optimizer_state is {self.optimizer_state!r}; expected one of: "
                f"{', '.join(OPTIMIZER_STATE)}."
            )
        if not 0 <= self.optimizer_offload_fraction <= 1:
            raise UpcyclingError(
                f"optimizer_offload_fraction is {self.optimizer_offload_fraction}; expected 0 to 1."
            )
        if self.optimizer_offload_fraction and self.optimizer_state != "fp32":
            raise UpcyclingError(
                f"optimizer_offload_fraction is {self.optimizer_offload_fraction:g} and "
                f"optimizer_state is {self.optimizer_state!r}; Megatron's offloaded optimizer "
                "keeps its moments in fp32. Leave one of them out."
            )

    def __str__(self) -> str:
        """Return what differs from Megatron's default, in words; empty for the default."""
        parts = []
        if self.optimizer_offload_fraction:
            parts.append(f"{self.optimizer_offload_fraction:.0%} of the optimizer on the CPUs")
        if self.optimizer_state != "fp32":
            parts.append(f"moments in {self.optimizer_state}")
        if not self.grad_reduce_in_fp32:
            parts.append("gradients in bf16")
        return ", ".join(parts)

    @property
    def moment_bytes(self) -> int:
        """Bytes per value of Adam's moments."""
        return OPTIMIZER_STATE[self.optimizer_state]

    @property
    def chosen(self) -> dict[str, object]:
        """The fields that differ from Megatron's default, by name."""
        default = vars(OptimizerStorage())
        return {name: value for name, value in vars(self).items() if value != default[name]}

    @property
    def is_default(self) -> bool:
        """Whether all is in fp32 and on the GPUs."""
        return not self.chosen

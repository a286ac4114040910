"""The parallel mapping, with parallel folding; checked on construction."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from nemo_upcycle.errors import UpcyclingError

UNEVEN_STAGES = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
ACCOUNTED_LAYERS = (
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)

RECOMPUTE: dict[str, dict[str, object]] = {
    "none": {},
    "moe_act": {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]},
    "norm_act": {
        "recompute_granularity": "selective",
        "recompute_modules": ["layernorm", "moe_act"],
    },
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
"""What the backward pass recomputes instead of keeping, as Megatron's fields; the least first.
`moe_act`: the experts' activation function; `norm_act`: the norms too; `moe`: the MoE layers."""


@dataclass(frozen=True)
class ParallelFolding:
    """A parallel mapping: attention on TP×CP×DP×PP, experts on ETP×EP×EDP×PP.

    Attributes have Megatron's names; TP implies sequence parallelism. Layers are distributed
    evenly over the pipeline stages, with two exceptions. The first or the last stage can have a
    given number of layers (`num_layers_in_…`), or embedding and loss count as a layer each
    (`account_for_…`).

    Raises:
        UpcyclingError: A size is not positive, virtual or uneven stages are set without pipeline
            stages, or both kinds of uneven stages are set.

    Source: MoE Parallel Folding, arXiv 2504.14960.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False

    NAMES: ClassVar[dict[str, str]] = {
        "tp": "tensor_model_parallel_size",
        "cp": "context_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "ep": "expert_model_parallel_size",
        "etp": "expert_tensor_parallel_size",
    }
    """The papers' names of the sizes, and Megatron's."""

    @classmethod
    def of(cls, **sizes: Any) -> "ParallelFolding":
        """Return a folding by the papers' names: `ParallelFolding.of(tp=2, ep=8, pp=4, vpp=8)`.

        Args:
            sizes: Sizes by a key of `NAMES`, or by a field's name.

        Raises:
            UpcyclingError: A name is unknown, or as of the class.
        """
        known = {field.name for field in fields(cls)}
        values = {cls.NAMES.get(name, name): size for name, size in sizes.items()}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UpcyclingError(
                f"There is no {unknown[0]}; expected one of: {', '.join([*cls.NAMES, *known])}."
            )
        return cls(**values)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not isinstance(value, bool) and value < 1:
                raise UpcyclingError(f"{name} is {value}; expected 1 or more.")
        virtual = self.virtual_pipeline_model_parallel_size
        if virtual is not None and self.pipeline_model_parallel_size == 1:
            raise UpcyclingError(
                f"virtual_pipeline_model_parallel_size is {virtual}, but "
                "pipeline_model_parallel_size is 1; virtual stages need pipeline stages."
            )
        self._check_uneven_stages()

    def _check_uneven_stages(self) -> None:
        uneven = [name for name in UNEVEN_STAGES if getattr(self, name) is not None]
        if uneven and self.pipeline_model_parallel_size == 1:
            raise UpcyclingError(
                f"{uneven[0]} is {getattr(self, uneven[0])}, but pipeline_model_parallel_size is "
                "1; uneven stages need pipeline stages."
            )
        if uneven and self.accounted:
            raise UpcyclingError(
                f"Both {uneven[0]} and {self.accounted[0]} are set; Megatron supports one kind of "
                "uneven stages at a time. Leave one out."
            )

    def __str__(self) -> str:
        """Return the papers' notation: TP2 CP2 PP4 VPP8 · ETP1 EP8.

        PP4+L: the output layer counts as a layer; PP4+EL: the embedding too. first3, last5: layers
        of these stages.
        """
        sizes = {name.upper(): getattr(self, field) for name, field in self.NAMES.items()}
        embedding, loss = (getattr(self, name) for name in ACCOUNTED_LAYERS)
        counted = ("E" if embedding else "") + ("L" if loss else "")
        uneven = zip(("first", "last"), UNEVEN_STAGES, strict=True)
        attention = [
            f"TP{sizes['TP']} CP{sizes['CP']} PP{sizes['PP']}" + (f"+{counted}" if counted else ""),
            *(f"{where}{layers}" for where, name in uneven if (layers := getattr(self, name))),
            f"VPP{sizes['VPP']}" if sizes["VPP"] else "",
        ]
        return f"{' '.join(filter(None, attention))} · ETP{sizes['ETP']} EP{sizes['EP']}"

    @property
    def accounted(self) -> list[str]:
        """The fields of `ACCOUNTED_LAYERS` that are set."""
        return [name for name in ACCOUNTED_LAYERS if getattr(self, name)]

    @property
    def sequence_parallel(self) -> bool:
        """Whether activations are split along the sequence between the TP regions.

        Megatron-Core's MoE with TP requires sequence parallelism.
        """
        return self.tensor_model_parallel_size > 1

    @property
    def parallel_sizes(self) -> dict[str, int | None]:
        """The arguments of Megatron's `initialize_model_parallel`."""
        return {name: getattr(self, name) for name in self.NAMES.values()}

    @property
    def strategy_arguments(self) -> dict[str, Any]:
        """The arguments of NeMo's MegatronStrategy and of Megatron's config.

        Includes expert_tensor_parallel_size even if 1: NeMo's default is TP, which would split
        every expert.
        """
        return {**vars(self), "sequence_parallel": self.sequence_parallel}

    def data_parallel_size(self, world_size: int) -> int:
        """Return DP = W/(TP·CP·PP).

        Raises:
            UpcyclingError: The mapping does not divide the world size.
        """
        attention = (
            self.tensor_model_parallel_size
            * self.context_parallel_size
            * self.pipeline_model_parallel_size
        )
        return _divide(world_size, attention, "TP·CP·PP")

    def expert_data_parallel_size(self, world_size: int) -> int:
        """Return EDP = W/(ETP·EP·PP).

        Raises:
            UpcyclingError: The mapping does not divide the world size.
        """
        experts = (
            self.expert_tensor_parallel_size
            * self.expert_model_parallel_size
            * self.pipeline_model_parallel_size
        )
        return _divide(world_size, experts, "ETP·EP·PP")

    def validate(self, world_size: int | None = None, num_moe_experts: int | None = None) -> None:
        """Check the folding against a world size and an expert count, if known.

        Raises:
            UpcyclingError: A size does not divide.
        """
        if world_size is not None:
            self.data_parallel_size(world_size)
            self.expert_data_parallel_size(world_size)
        expert_parallel = self.expert_model_parallel_size
        if num_moe_experts is not None and num_moe_experts % expert_parallel:
            raise UpcyclingError(
                f"{num_moe_experts} experts do not divide over expert_model_parallel_size="
                f"{expert_parallel}; choose a divisor of {num_moe_experts}."
            )


def _divide(world_size: int, by: int, product: str) -> int:
    if world_size % by:
        raise UpcyclingError(
            f"{world_size} ranks do not divide by {product} = {by}; "
            f"use a multiple of {by} ranks or another mapping."
        )
    return world_size // by

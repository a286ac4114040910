"""What the dense model becomes (`UpcyclingConfig`) and how it is spread (`ParallelFolding`).

Plain data, validated on construction: recipes, the plan and the command line read the same
numbers, and none of them needs NeMo or torch for it.
"""

from dataclasses import dataclass

from nemo_upcycle.errors import UpcyclingError

UNEVEN_STAGES = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
ACCOUNTED_LAYERS = (
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


@dataclass(frozen=True)
class Exactness:
    """Whether the upcycled model computes the dense function at step 0, and why."""

    exact: bool
    reason: str

    def __str__(self) -> str:
        return f"{'exact' if self.exact else 'not exact'}: {self.reason}"


@dataclass(frozen=True)
class UpcyclingConfig:
    """What every dense feed-forward layer becomes.

    Attributes:
        num_moe_experts: Experts per layer, each a copy of the dense feed-forward layer; None
            keeps the layers dense (the continued-training control).
        moe_router_topk: Experts that each token visits.
        moe_router_pre_softmax: False: top-k, then softmax over the k (Mixtral-type, the paper's
            choice). True: softmax over all experts, then top-k (ST-type).
        moe_expert_capacity_factor: Tokens that an expert accepts, as a multiple of its even
            share ceil(tokens·topk/experts); None never drops a token.
        router_init_std: Standard deviation of the random router weights.
        seed: Seed of all random values.

    Raises:
        UpcyclingError: A value is out of range or contradicts another.

    Source: arXiv 2412.09952 §3; the capacity is Megatron-Core's.
    """

    num_moe_experts: int | None = 8
    moe_router_topk: int = 2
    moe_router_pre_softmax: bool = False
    moe_expert_capacity_factor: float | None = None
    router_init_std: float = 0.02
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.num_moe_experts is None:
            return
        if self.num_moe_experts < 2:
            raise UpcyclingError(
                f"num_moe_experts is {self.num_moe_experts}; an MoE needs at least 2 "
                "(None keeps the model dense)."
            )
        if not 1 <= self.moe_router_topk <= self.num_moe_experts:
            raise UpcyclingError(
                f"moe_router_topk is {self.moe_router_topk}; expected 1 to num_moe_experts "
                f"({self.num_moe_experts})."
            )
        if self.moe_expert_capacity_factor is not None and self.moe_expert_capacity_factor <= 0:
            raise UpcyclingError(
                f"moe_expert_capacity_factor is {self.moe_expert_capacity_factor}; expected a "
                "positive number, or None to never drop a token."
            )
        if self.router_init_std < 0:
            raise UpcyclingError(f"router_init_std is {self.router_init_std}; expected 0 or more.")

    @property
    def can_drop_tokens(self) -> bool:
        """Whether an expert can be offered more tokens than it accepts.

        At worst every token picks the same expert: experts/topk times its even share.
        """
        factor = self.moe_expert_capacity_factor
        if self.num_moe_experts is None or factor is None:
            return False
        return factor < self.num_moe_experts / self.moe_router_topk

    def exactness(self) -> Exactness:
        """Say whether the upcycled model computes the dense function at step 0."""
        experts, topk = self.num_moe_experts, self.moe_router_topk
        if experts is None:
            return Exactness(True, "every layer is the dense layer")
        if self.moe_router_pre_softmax:
            return Exactness(
                False,
                "softmax before top-k weights the chosen experts by less than 1 in total, so each "
                f"feed-forward output is scaled by a factor between {topk}/{experts} and 1 "
                "(set moe_router_pre_softmax=False for an exact start)",
            )
        if self.can_drop_tokens:
            return Exactness(
                False,
                f"experts are the dense layer and their weights sum to 1, but capacity factor "
                f"{self.moe_expert_capacity_factor:g} drops the tokens an expert has no room for "
                f"(at {experts / topk:g} and above, or with None, none is dropped)",
            )
        return Exactness(True, "experts are the dense layer and their weights sum to 1")


@dataclass(frozen=True)
class ParallelFolding:
    """How one model is spread: attention on TP×CP×DP×PP, experts on ETP×EP×EDP×PP.

    Attributes are Megatron's names; sequence parallelism comes with TP. Layers are spread evenly
    over the pipeline stages, unless the first or the last stage is given a number of them
    (`num_layers_in_…`), or embedding and loss count as a layer each (`account_for_…`).

    Raises:
        UpcyclingError: A size is not positive, virtual stages or uneven stages come without
            pipeline stages, or both kinds of uneven stages are asked for.

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
        accounted = [name for name in ACCOUNTED_LAYERS if getattr(self, name)]
        if uneven and accounted:
            raise UpcyclingError(
                f"Both {uneven[0]} and {accounted[0]} are set; Megatron takes one kind of uneven "
                "stages. Drop one."
            )

    @property
    def sequence_parallel(self) -> bool:
        """Whether activations are split along the sequence between the TP regions.

        Megatron-Core's MoE with TP needs it.
        """
        return self.tensor_model_parallel_size > 1

    def data_parallel_size(self, world_size: int) -> int:
        """Return DP = W/(TP·CP·PP).

        Raises:
            UpcyclingError: The world size does not divide.
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
            UpcyclingError: The world size does not divide.
        """
        experts = (
            self.expert_tensor_parallel_size
            * self.expert_model_parallel_size
            * self.pipeline_model_parallel_size
        )
        return _divide(world_size, experts, "ETP·EP·PP")

    def validate(self, world_size: int | None = None, num_moe_experts: int | None = None) -> None:
        """Check the folding against a world size and an expert count, where they are known.

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

"""What the dense feed-forward layers become; checked on construction."""

import math
from dataclasses import dataclass

from nemo_upcycle.config import step0
from nemo_upcycle.config.step0 import Exactness, Scales
from nemo_upcycle.errors import UpcyclingError

LARGEST_NUMBER = 1e30
"""Limit for factors of weights and losses: products must be finite in fp32, up to 3.4e38."""

LARGEST_SEED = 2**63 - 1
"""Limit for seeds: numpy rounds larger seeds, so that several would give the same values."""


@dataclass(frozen=True)
class UpcyclingConfig:
    """What each dense feed-forward layer becomes.

    E, G and T are the expansion rate, granularity and top-k of arXiv 2410.07524. The layer is cut
    into G shards along its width, with E copies of each shard, so there are E·G experts in total.

    Attributes:
        num_moe_experts: Experts per layer, E·G; None keeps the layers dense (the
            continued-training control).
        granularity: G. Expert e is shard e mod G of the dense feed-forward layer, 1/G as wide.
        moe_router_topk: T, experts that each token visits.
        moe_router_pre_softmax: False: top-k, then softmax over the k (Mixtral-type, the paper's
            choice). True: softmax over all experts, then top-k (ST-type).
        moe_router_score_function: `softmax`, or `sigmoid` (DeepSeek-V3-type): each expert's score
            is independent of the others, and the k chosen scores are divided by their sum.
        moe_router_enable_expert_bias: Balance the load by a bias per expert, which only decides
            the choice of experts and is moved after each step; needs `sigmoid`. Usual together
            with `moe_router_load_balancing_type="none"`.
        moe_router_bias_update_rate: What a step adds to the bias of an expert with less than the
            mean load, and takes from that of an expert with more.
        router_logit_normalization: λ: for each token, the experts' logits become λ times their
            distances from the mean in standard deviations, before softmax or sigmoid. None leaves
            the logits. 1 is arXiv 2406.06563's choice.
        router_dense_gradient: In training, all experts compute all tokens, so that the router
            learns from the experts that were not chosen too; the forward pass is that of top-k.
            The experts cost E·G/T times as much.
        moe_router_load_balancing_type: `aux_loss`, `seq_aux_loss`, `global_aux_loss`, or `none`.
        moe_aux_loss_coeff: Factor of the auxiliary loss. 1e-2 is arXiv 2410.07524's best.
        moe_z_loss_coeff: Factor of the router's z-loss; None disables the z-loss.
        moe_expert_capacity_factor: Tokens that an expert accepts, as a multiple of its even
            share ceil(tokens·topk/experts); None never drops a token.
        moe_pad_expert_input_to_capacity: Pad each expert's tokens to the capacity, so that all
            sizes are known in advance.
        moe_token_dispatcher_type: `alltoall`, `allgather` or `flex`.
        moe_layer_freq: Which layers become MoE layers; the others stay dense. Every n-th layer
            from the first, or a list of 0 and 1, as in Megatron; or a text, see
            `layers.moe_layers`.
        moe_shared_expert: Keep the dense feed-forward layer as an expert for all tokens, in
            addition to the routed experts, which together hold whole copies.
        moe_shared_expert_intermediate_size: Width of a shared expert that holds a part of the
            dense feed-forward layer; the routed experts then hold only the rest. 1 or more: the
            first so many neurons; below 1: a fraction of the layer. None: no such part.
        weight_scaling: Compensation for the router's weights and for G: `exact`, `paper` or
            `none`, see `scales`. None takes `exact` if exact; otherwise the papers' choice: `none`
            for G=1 (arXiv 2412.09952), `paper` for G>1 (arXiv 2410.07524).
        initializer: Initializer of experts, such as `copy` or `drop(ratio=0.5)`; see
            `initializers`.
        router_initializer: Initializer of routers, such as `virtual_groups` or
            `centroids(stats='FILE')`; see `initializers` and `router_row`.
        router_init_std: Standard deviation of random router weights. Rows that are not random get
            the length of random rows, unless their initializer has another.
        seed: Seed of all random values, from 0 to 2**63 - 1.

    Raises:
        UpcyclingError: A value is out of range or contradicts another.

    Source: arXiv 2412.09952 §3, arXiv 2410.07524 §3; the expert bias is arXiv 2408.15664's; the
    capacity is Megatron-Core's.
    """

    num_moe_experts: int | None = 8
    granularity: int = 1
    moe_router_topk: int = 2
    moe_router_pre_softmax: bool = False
    moe_router_score_function: str = "softmax"
    moe_router_enable_expert_bias: bool = False
    moe_router_bias_update_rate: float = 1e-3
    router_logit_normalization: float | None = None
    router_dense_gradient: bool = False
    moe_router_load_balancing_type: str = "aux_loss"
    moe_aux_loss_coeff: float = 1e-2
    moe_z_loss_coeff: float | None = None
    moe_expert_capacity_factor: float | None = None
    moe_pad_expert_input_to_capacity: bool = False
    moe_token_dispatcher_type: str = "alltoall"
    moe_layer_freq: int | str | tuple[int, ...] = 1
    moe_shared_expert: bool = False
    moe_shared_expert_intermediate_size: float | None = None
    weight_scaling: str | None = None
    initializer: str = "copy"
    router_initializer: str = "virtual_groups"
    router_init_std: float = 0.02
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.num_moe_experts is None:
            return
        self._check_experts(self.num_moe_experts)
        self._check_choices()
        self._check_scores()
        self._check_shared()
        self._check_dispatch()
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= LARGEST_NUMBER:  # also true for NaN
                raise UpcyclingError(
                    f"{name} is {value}; expected a number of 0 or more, up to {LARGEST_NUMBER:g}."
                )
        self._check_seed()

    def _check_seed(self) -> None:
        is_integer = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        if not is_integer or not 0 <= self.seed <= LARGEST_SEED:
            raise UpcyclingError(
                f"seed is {self.seed!r}; expected an integer from 0 to {LARGEST_SEED} (2**63 - 1)."
            )

    def _check_experts(self, experts: int) -> None:
        # Checked before the number of experts, which depends on the granularity.
        if self.granularity < 1:
            raise UpcyclingError(
                f"granularity is {self.granularity}; expected 1 or more: the shards that the "
                "dense feed-forward layer is cut into."
            )
        if experts < 2:
            raise UpcyclingError(
                f"num_moe_experts is {experts}; an MoE needs at least 2 "
                "(None keeps the model dense)."
            )
        if experts % self.granularity:
            raise UpcyclingError(
                f"granularity is {self.granularity}, num_moe_experts {experts}; expected a "
                "granularity that divides num_moe_experts: there are E·G experts, E copies of each "
                "of G shards."
            )
        if not 1 <= self.moe_router_topk <= experts:
            raise UpcyclingError(
                f"moe_router_topk is {self.moe_router_topk}; expected 1 to num_moe_experts "
                f"({experts})."
            )
        softmax_last = (
            self.moe_router_score_function == "softmax" and not self.moe_router_pre_softmax
        )
        if self.moe_router_topk == 1 and softmax_last:
            raise UpcyclingError(
                "moe_router_topk is 1 with softmax after top-k: the softmax of one value is 1, so "
                "the router would not learn. Use 2 or more, or moe_router_pre_softmax=True."
            )

    def _check_choices(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                expected = ", ".join(str(choice) for choice in choices)
                raise UpcyclingError(f"{name} is {value!r}; expected one of: {expected}.")

    def _check_scores(self) -> None:
        normalization = self.router_logit_normalization
        if normalization is not None and not 0 < normalization <= LARGEST_NUMBER:  # also for NaN
            raise UpcyclingError(
                f"router_logit_normalization is {normalization}; expected a number above 0, such "
                "as 1, or None to leave the logits."
            )
        if self.moe_router_score_function == "sigmoid" and self.moe_router_pre_softmax:
            raise UpcyclingError(
                "moe_router_pre_softmax is True with moe_router_score_function='sigmoid'; expected "
                "False: each sigmoid is computed before top-k in any case. Leave "
                "moe_router_pre_softmax out."
            )
        if self.moe_router_enable_expert_bias and self.moe_router_score_function != "sigmoid":
            raise UpcyclingError(
                "moe_router_enable_expert_bias is True with moe_router_score_function="
                f"{self.moe_router_score_function!r}; Megatron-Core has the bias only with "
                "'sigmoid'. Set moe_router_score_function='sigmoid'."
            )

    def _check_shared(self) -> None:
        size = self.moe_shared_expert_intermediate_size
        if size is None:
            return
        if self.moe_shared_expert:
            raise UpcyclingError(
                "moe_shared_expert=True keeps the whole dense layer, "
                f"moe_shared_expert_intermediate_size={size:g} a part of the layer. Leave one out."
            )
        if not (0 < size < 1 or (1 < size < math.inf and size == int(size))):  # also for NaN
            raise UpcyclingError(
                f"moe_shared_expert_intermediate_size is {size}; expected 2 or more neurons, or a "
                "fraction of the dense feed-forward layer between 0 and 1."
            )

    def _check_dispatch(self) -> None:
        factor = self.moe_expert_capacity_factor
        if factor is not None and not 0 < factor < math.inf:
            raise UpcyclingError(
                f"moe_expert_capacity_factor is {factor}; expected a positive number, or None to "
                "never drop a token."
            )
        if self.moe_pad_expert_input_to_capacity and factor is None:
            raise UpcyclingError(
                "moe_pad_expert_input_to_capacity needs a capacity to pad to; set "
                "moe_expert_capacity_factor."
            )
        if self.moe_pad_expert_input_to_capacity and self.moe_token_dispatcher_type != "alltoall":
            raise UpcyclingError(
                f"moe_token_dispatcher_type is {self.moe_token_dispatcher_type!r}, which does not "
                "pad; moe_pad_expert_input_to_capacity needs 'alltoall'."
            )

        if self.router_dense_gradient and (
            factor is not None or self.moe_token_dispatcher_type == "flex"
        ):
            raise UpcyclingError(
                f"router_dense_gradient is True with moe_expert_capacity_factor={factor} and "
                f"moe_token_dispatcher_type={self.moe_token_dispatcher_type!r}; expected no "
                "capacity, because all experts compute all tokens, and 'alltoall' or 'allgather'."
            )

    @property
    def expansion_rate(self) -> int:
        """E: copies of the dense feed-forward layer; 1 in a dense model."""
        return (self.num_moe_experts or 1) // self.granularity

    @property
    def label(self) -> str:
        """The usual short name: E8T2; E8G4T8 with granularity."""
        if self.num_moe_experts is None:
            return "dense, as it is"
        granularity = f"G{self.granularity}" if self.granularity > 1 else ""
        return f"E{self.expansion_rate}{granularity}T{self.moe_router_topk}{self._shared_label}"

    @property
    def _shared_label(self) -> str:
        size = self.moe_shared_expert_intermediate_size
        if size is not None:
            part = f"{size:.0%} of the layer" if size < 1 else f"{size:.0f} neurons"
            return f" and a shared expert of {part}"
        return " and a shared expert" if self.moe_shared_expert else ""

    def active_parameters(self, parameters: int, routed: int) -> int:
        """Return the parameters that a token uses.

        Args:
            parameters: All parameters.
            routed: The parameters of routed experts among them.
        """
        experts = self.num_moe_experts
        if experts is None:
            return parameters
        return parameters - routed * (experts - self.moe_router_topk) // experts

    def neurons(self, expert: int, ffn_hidden_size: int) -> tuple[int, int]:
        """Return the dense feed-forward layer's neurons that make up an expert.

        Args:
            expert: The global expert.
            ffn_hidden_size: Neurons of the dense layer.

        Returns:
            Start and stop of shard e mod G of the layer, or of what a shared part leaves.
        """
        width = self.expert_width(ffn_hidden_size)
        start = self._taken(ffn_hidden_size) + expert % self.granularity * width
        return start, start + width

    def expert_width(self, ffn_hidden_size: int) -> int:
        """Return the neurons of a routed expert.

        Args:
            ffn_hidden_size: Neurons of the dense layer.

        Raises:
            UpcyclingError: The neurons that a shared part leaves do not divide by G.
        """
        left, granularity = ffn_hidden_size - self._taken(ffn_hidden_size), self.granularity
        if left % granularity:
            less = "" if left == ffn_hidden_size else f" less {ffn_hidden_size - left} shared"
            raise UpcyclingError(
                f"ffn_hidden_size={ffn_hidden_size}{less} does not divide by granularity="
                f"{granularity}; choose a divisor of {left}."
            )
        return left // granularity

    def shared_width(self, ffn_hidden_size: int) -> int:
        """Return the neurons of the shared expert; 0 if there is none.

        They are the dense layer's first, in the order of an initializer that rearranges neurons.

        Args:
            ffn_hidden_size: Neurons of the dense layer.

        Raises:
            UpcyclingError: The shared part is no whole number of neurons, or not a part.
        """
        if self.num_moe_experts is None:
            return 0
        return ffn_hidden_size if self.moe_shared_expert else self._taken(ffn_hidden_size)

    def _taken(self, ffn_hidden_size: int) -> int:
        """Return the neurons that routed experts leave to a shared part."""
        size = self.moe_shared_expert_intermediate_size
        if size is None or self.num_moe_experts is None:
            return 0
        neurons = round(size * ffn_hidden_size if size < 1 else size)
        # A fraction such as 0.1 is rounded in binary.
        whole = size >= 1 or math.isclose(neurons, size * ffn_hidden_size, rel_tol=1e-9)
        if not whole or not 1 < neurons < ffn_hidden_size:
            made = size * ffn_hidden_size if size < 1 else size
            raise UpcyclingError(
                f"moe_shared_expert_intermediate_size={size:g} gives the shared expert {made:g} of "
                f"{ffn_hidden_size} neurons; expected a whole number from 2 to "
                f"{ffn_hidden_size - 1}. Give the number of neurons."
            )
        return neurons

    def copy_of(self, expert: int) -> int:
        """Return the copy of the layer that an expert belongs to: e div G."""
        return expert // self.granularity

    @property
    def router_rows(self) -> int:
        """Number of different rows of a router."""
        return self.router_row((self.num_moe_experts or 1) - 1) + 1

    def router_row(self, expert: int) -> int:
        """Return the row of a router that an expert has.

        The G experts that make up one copy of the layer have the same row, so that top-k picks
        whole copies. Every expert has a row of its own with `random`, and where there is only one
        copy: with the same row for all, the router would have nothing to choose.
        """
        return self.copy_of(expert) if self.routes_copies else expert

    @property
    def rearranges(self) -> bool:
        """Whether the initializer puts the dense layer's neurons, all of them, in another order.

        A shared part then has the first neurons in that order.
        """
        name = self.initializer.partition("(")[0].strip()
        return name in step0.REARRANGING and name != "copy"

    @property
    def routes_copies(self) -> bool:
        """Whether the experts of a copy of the layer have the same row of the router."""
        if self.router == "virtual_groups":
            return True
        return self.router != "random" and self.expansion_rate > 1

    @property
    def router(self) -> str:
        """Name of the router's initializer, without options."""
        return self.router_initializer.partition("(")[0].strip()

    @property
    def can_drop_tokens(self) -> bool:
        """Whether an expert can receive more tokens than the capacity."""
        return self.dropped_at_worst > 0

    @property
    def dropped_at_worst(self) -> float:
        """Fraction of the assignments that is dropped if all tokens pick the same experts.

        Each of these experts then receives all tokens and accepts a fraction CF·topk/experts.
        """
        factor = self.moe_expert_capacity_factor
        if self.num_moe_experts is None or factor is None:
            return 0.0
        return max(0.0, 1 - factor * self.moe_router_topk / self.num_moe_experts)

    @property
    def scaling(self) -> str:
        """The weight scaling, with the default resolved."""
        if self.weight_scaling is not None:
            return self.weight_scaling
        if not self.moe_router_pre_softmax:
            return "exact"
        return "none" if self.granularity == 1 else "paper"

    def scales(self, gated: bool) -> Scales:
        """Return the factors of an expert's weights; see `step0.scales`."""
        return step0.scales(self, gated)

    def exactness(self, gated: bool, dense_checkpoints: int) -> Exactness:
        """Return whether the model computes the dense function; see `step0.exactness`."""
        return step0.exactness(self, gated, dense_checkpoints)


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "weight_scaling": (None, "exact", "paper", "none"),
    "moe_router_score_function": ("softmax", "sigmoid"),
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
    "moe_token_dispatcher_type": ("alltoall", "allgather", "flex"),
}

_NOT_NEGATIVE = (
    "router_init_std",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_router_bias_update_rate",
)

"""What the dense feed-forward layers become; checked on construction."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from nemo_upcycle.errors import UpcyclingError

LARGEST_NUMBER = 1e30
"""Limit for factors of weights and losses: products must be finite in fp32, up to 3.4e38."""

LARGEST_SEED = 2**63 - 1
"""Limit for seeds: numpy rounds larger seeds, so that several would give the same values."""


@dataclass(frozen=True)
class Exactness:
    """Whether the upcycled model computes the dense model's function at step 0, and why."""

    exact: bool
    reason: str

    def __str__(self) -> str:
        return f"{'exact' if self.exact else 'not exact'}: {self.reason}"


@dataclass(frozen=True)
class Scales:
    """Factors of an expert's weights, and of a shared expert's down projection."""

    gate: float = 1.0
    up: float = 1.0
    down: float = 1.0
    shared_down: float = 1.0


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
            addition to the routed experts.
        weight_scaling: Compensation for the router's weights and for G: `exact`, `paper` or
            `none`, see `scales`. None takes `exact` if exact; otherwise the papers' choice: `none`
            for G=1 (arXiv 2412.09952), `paper` for G>1 (arXiv 2410.07524).
        initializer: Initialiser of experts, such as `copy` or `drop(ratio=0.5)`; see
            `initializers`.
        router_initializer: Initialiser of routers, such as `virtual_groups` or
            `centroids(stats='FILE')`; see `initializers` and `router_row`.
        router_init_std: Standard deviation of random router weights. Rows that are not random get
            the length of random rows, unless their initialiser has another.
        seed: Seed of all random values, from 0 to 2**63 - 1.

    Raises:
        UpcyclingError: A value is out of range or contradicts another.

    Source: arXiv 2412.09952 §3, arXiv 2410.07524 §3; the capacity is Megatron-Core's.
    """

    num_moe_experts: int | None = 8
    granularity: int = 1
    moe_router_topk: int = 2
    moe_router_pre_softmax: bool = False
    moe_router_load_balancing_type: str = "aux_loss"
    moe_aux_loss_coeff: float = 1e-2
    moe_z_loss_coeff: float | None = None
    moe_expert_capacity_factor: float | None = None
    moe_pad_expert_input_to_capacity: bool = False
    moe_token_dispatcher_type: str = "alltoall"
    moe_layer_freq: int | str | tuple[int, ...] = 1
    moe_shared_expert: bool = False
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
        self._check_dispatch()
        for name in ("router_init_std", "moe_aux_loss_coeff", "moe_z_loss_coeff"):
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
        if self.moe_router_topk == 1 and not self.moe_router_pre_softmax:
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
        shared = " and a shared expert" if self.moe_shared_expert else ""
        return f"E{self.expansion_rate}{granularity}T{self.moe_router_topk}{shared}"

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
            ffn_hidden_size: Neurons of the dense layer; G divides it.

        Returns:
            Start and stop of shard e mod G.
        """
        width = ffn_hidden_size // self.granularity
        shard = expert % self.granularity
        return shard * width, (shard + 1) * width

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
        return self.copy_of(expert) if self._routes_copies else expert

    @property
    def _routes_copies(self) -> bool:
        if self._router == "virtual_groups":
            return True
        return self._router != "random" and self.expansion_rate > 1

    @property
    def _router(self) -> str:
        """Name of the router's initialiser, without options."""
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
        """Return the factors of an expert's weights.

        The routed output is smaller than the dense output by a factor, the base. With top-k first
        the base is G, because the weights sum to 1 over T/G copies of each shard. With softmax
        first the base is about E·G²/T, because each weight is about 1/(E·G).

        `exact` makes the output larger by the base. A SwiGLU neuron is linear in up and in down,
        so up and down get √base each. A squared-ReLU neuron is quadratic in up, so both get ∛base.
        With a shared expert, routed and shared output are both halved in down. `paper` multiplies
        gate, up and down by ∛base, as Megatron-Core does, which changes a SwiGLU neuron's function.

        Args:
            gated: Whether a neuron is SwiGLU; squared ReLU otherwise.

        Source: arXiv 2410.07524 Eq. 2.
        """
        base = float(self.granularity)
        if self.moe_router_pre_softmax:
            base *= self.expansion_rate * self.granularity / self.moe_router_topk
        if self.scaling == "none":
            return Scales()
        if self.scaling == "paper":
            factor = base ** (1 / 3)
            return Scales(gate=factor, up=factor, down=factor)
        factor = base ** (1 / 2 if gated else 1 / 3)
        half = 0.5 if self.moe_shared_expert else 1.0
        return Scales(up=factor, down=half * factor, shared_down=half)

    def exactness(self, gated: bool, dense_checkpoints: int) -> Exactness:
        """Return whether the upcycled model computes the dense model's function at step 0.

        Args:
            gated: Whether a neuron is SwiGLU; squared ReLU otherwise.
            dense_checkpoints: Number of dense models that the experts come from.
        """
        if self.num_moe_experts is None:
            return Exactness(True, "every layer is the dense layer")
        problems = [*self._inexact_weights(gated, dense_checkpoints), *self._inexact_routing()]
        if problems:
            return Exactness(False, "; ".join(problems))
        if self.granularity == 1:
            made = "experts are the dense layer and their weights sum to 1"
        else:
            made = "a token's experts make up whole copies of the dense layer"
        return Exactness(True, made)

    def _inexact_weights(self, gated: bool, dense_checkpoints: int) -> Iterator[str]:
        if dense_checkpoints > 1:
            yield (
                f"experts come from {dense_checkpoints} dense models, and all other weights are "
                "averages"
            )
        if self.initializer.partition("(")[0].strip() not in _REARRANGING:
            yield f"the initializer {self.initializer} makes experts unlike the dense layer"
        if self.moe_shared_expert and self.scaling != "exact":
            yield (
                "the shared expert and the routed ones add up to twice the feed-forward output "
                "(weight_scaling='exact' halves both)"
            )
        if self.granularity > 1 and not self.moe_router_pre_softmax:
            if self.scaling == "none":
                yield f"the feed-forward output is divided by granularity {self.granularity}"
            elif self.scaling == "paper" and gated:
                yield (
                    "cube-root scaling changes what a SwiGLU neuron computes "
                    "(weight_scaling='exact' does not)"
                )

    def _inexact_routing(self) -> Iterator[str]:
        experts, topk, granularity = (
            self.num_moe_experts or 0,
            self.moe_router_topk,
            self.granularity,
        )
        if self.moe_router_pre_softmax and self.scaling == "none":
            yield (
                "softmax before top-k weights the chosen experts by less than 1 in total, so "
                f"feed-forward outputs are scaled by a factor from {topk}/{experts} to 1 "
                "(set moe_router_pre_softmax=False for an exact start)"
            )
        elif self.moe_router_pre_softmax:
            yield (
                "softmax before top-k weights experts unevenly, which a fixed scaling makes up "
                "for only on average (set moe_router_pre_softmax=False for an exact start)"
            )
        if granularity > 1 and not self._routes_copies:
            yield (
                f"a {self._router} router picks {topk} of {experts} experts without regard to the "
                f"{granularity} shards of the layer that they hold"
            )
        elif topk % granularity:
            yield (
                f"{topk} experts per token do not make up whole copies of {granularity} shards "
                f"(use a multiple of {granularity})"
            )
        if self.can_drop_tokens:
            yield (
                f"capacity factor {self.moe_expert_capacity_factor:g} drops tokens beyond an "
                f"expert's capacity: if all tokens pick the same experts, "
                f"{self.dropped_at_worst:.0%} of the assignments (at {experts / topk:g} and "
                "above, or with None, none is dropped)"
            )


_REARRANGING = ("copy", "activation_sorted")
"""Initialisers whose experts are neurons of the dense layer, all of them in each copy."""

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "weight_scaling": (None, "exact", "paper", "none"),
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
    "moe_token_dispatcher_type": ("alltoall", "allgather", "flex"),
}

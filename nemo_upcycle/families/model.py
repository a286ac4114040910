"""Description of an upcycled model, and its derivation from a dense model."""

from dataclasses import asdict, dataclass
from typing import Any

from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.config.layers import moe_layers
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.family import Architecture
from nemo_upcycle.families.names import is_shared


@dataclass(frozen=True)
class Experts:
    """The experts that the feed-forward layers of a dense model have become.

    Attributes:
        num_experts: Experts per MoE layer; 0 without MoE layers.
        topk: Experts per token.
        pre_softmax: Softmax before top-k; the weights then do not sum to 1.
        expert_width: Neurons per expert.
        is_moe: For every layer, whether the layer has experts.
        shared_width: Neurons of the shared expert: all of the dense feed-forward layer's, a part
            that the routed experts leave, or 0 if there is none.
        score_function: `softmax` or `sigmoid`; see `UpcyclingConfig`.
        has_expert_bias: Whether the choice of experts has a bias per expert.
        logit_normalization: Factor of the normalized logits; None if they are not normalized.
    """

    num_experts: int
    topk: int
    pre_softmax: bool
    expert_width: int
    is_moe: tuple[bool, ...]
    shared_width: int = 0
    score_function: str = "softmax"
    has_expert_bias: bool = False
    logit_normalization: float | None = None

    @property
    def has_shared_expert(self) -> bool:
        """Whether there is a shared expert."""
        return self.shared_width > 0


@dataclass(frozen=True, kw_only=True)
class MoEModel(Experts):
    """A model, dense or upcycled.

    Attributes:
        arch: The dense model's architecture.
    """

    arch: Architecture

    def neurons_of(self, parameter: str) -> int:
        """Return the neurons of the feed-forward layer that a Megatron parameter belongs to.

        Args:
            parameter: The name, with numbers or `{layer}` and `{expert}`.
        """
        if ".mlp.experts." in parameter:
            return self.expert_width
        return self.shared_width if is_shared(parameter) else self.arch.ffn_hidden_size


def experts_of(upcycling: UpcyclingConfig, num_layers: int, dense_width: int) -> Experts:
    """Return the experts that upcycling makes.

    Args:
        upcycling: What the dense feed-forward layers become.
        num_layers: Layers of the dense model.
        dense_width: Neurons of a dense feed-forward layer.

    Raises:
        UpcyclingError: The layer does not divide into the experts.
    """
    if upcycling.num_moe_experts is None:
        return no_experts(num_layers, dense_width)
    return Experts(
        num_experts=upcycling.num_moe_experts,
        topk=upcycling.moe_router_topk,
        pre_softmax=upcycling.moe_router_pre_softmax,
        expert_width=upcycling.expert_width(dense_width),
        is_moe=moe_layers(upcycling.moe_layer_freq, num_layers),
        shared_width=upcycling.shared_width(dense_width),
        score_function=upcycling.moe_router_score_function,
        has_expert_bias=upcycling.moe_router_enable_expert_bias,
        logit_normalization=upcycling.router_logit_normalization,
    )


def no_experts(num_layers: int, dense_width: int) -> Experts:
    """Return the description of a model that stays dense."""
    return Experts(0, 0, False, dense_width, (False,) * num_layers)


def upcycling_of(experts: Experts, dense_width: int, **chosen: Any) -> UpcyclingConfig:
    """Return the upcycling that makes these experts: the inverse of `experts_of`.

    Args:
        experts: The experts.
        dense_width: Neurons of a dense feed-forward layer.
        chosen: Values not visible in experts: initializer, scaling, seed, losses, capacity.

    Raises:
        UpcyclingError: The experts' width does not divide the dense layer's.
    """
    if not any(experts.is_moe):
        return UpcyclingConfig(num_moe_experts=None, **chosen)
    is_whole = experts.shared_width in (0, dense_width)
    routed = dense_width if is_whole else dense_width - experts.shared_width
    if routed % experts.expert_width:
        what = "the dense feed-forward layer's" if is_whole else "what a shared expert leaves of it"
        raise UpcyclingError(
            f"The experts' width moe_ffn_hidden_size={experts.expert_width} does not divide "
            f"{what}, {routed}. Make it 1/granularity of that."
        )
    return UpcyclingConfig(
        num_moe_experts=experts.num_experts,
        moe_router_topk=experts.topk,
        moe_router_pre_softmax=experts.pre_softmax,
        granularity=routed // experts.expert_width,
        moe_layer_freq=1 if all(experts.is_moe) else tuple(map(int, experts.is_moe)),
        moe_shared_expert=experts.shared_width == dense_width,
        moe_shared_expert_intermediate_size=None if is_whole else experts.shared_width,
        moe_router_score_function=experts.score_function,
        moe_router_enable_expert_bias=experts.has_expert_bias,
        router_logit_normalization=experts.logit_normalization,
        **chosen,
    )


def with_experts(arch: Architecture, experts: Experts) -> MoEModel:
    """Return the model that has these experts."""
    return MoEModel(arch=arch, **asdict(experts))


def upcycled_model(arch: Architecture, upcycling: UpcyclingConfig) -> MoEModel:
    """Return the upcycled model of a dense model.

    Args:
        arch: The dense model's architecture.
        upcycling: What the dense feed-forward layers become.
    """
    return with_experts(arch, experts_of(upcycling, arch.num_layers, arch.ffn_hidden_size))

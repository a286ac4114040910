"""Description of an upcycled model, and its derivation from a dense model."""

from dataclasses import asdict, dataclass
from typing import Any

from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.config.layers import moe_layers
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.family import Architecture


@dataclass(frozen=True)
class Experts:
    """The experts that the feed-forward layers of a dense model have become.

    Attributes:
        num_experts: Experts per MoE layer; 0 without MoE layers.
        topk: Experts per token.
        pre_softmax: Softmax before top-k; the weights then do not sum to 1.
        expert_width: Neurons per expert.
        is_moe: For every layer, whether the layer has experts.
        has_shared_expert: Whether the dense feed-forward layer is kept as a shared expert.
    """

    num_experts: int
    topk: int
    pre_softmax: bool
    expert_width: int
    is_moe: tuple[bool, ...]
    has_shared_expert: bool


@dataclass(frozen=True, kw_only=True)
class MoEModel(Experts):
    """A model, dense or upcycled.

    Attributes:
        arch: The dense model's architecture.
    """

    arch: Architecture


def experts_of(upcycling: UpcyclingConfig, num_layers: int, dense_width: int) -> Experts:
    """Return the experts that upcycling makes.

    Args:
        upcycling: What the dense feed-forward layers become.
        num_layers: Layers of the dense model.
        dense_width: Neurons of a dense feed-forward layer.
    """
    if upcycling.num_moe_experts is None:
        return no_experts(num_layers, dense_width)
    return Experts(
        num_experts=upcycling.num_moe_experts,
        topk=upcycling.moe_router_topk,
        pre_softmax=upcycling.moe_router_pre_softmax,
        expert_width=dense_width // upcycling.granularity,
        is_moe=moe_layers(upcycling.moe_layer_freq, num_layers),
        has_shared_expert=upcycling.moe_shared_expert,
    )


def no_experts(num_layers: int, dense_width: int) -> Experts:
    """Return the description of a model that stays dense."""
    return Experts(0, 0, False, dense_width, (False,) * num_layers, False)


def upcycling_of(experts: Experts, dense_width: int, **chosen: Any) -> UpcyclingConfig:
    """Return the upcycling that makes these experts: the inverse of `experts_of`.

    Args:
        experts: The experts.
        dense_width: Neurons of a dense feed-forward layer.
        chosen: Values not visible in experts: initialiser, scaling, seed, losses, capacity.

    Raises:
        UpcyclingError: The experts' width does not divide the dense layer's.
    """
    if not any(experts.is_moe):
        return UpcyclingConfig(num_moe_experts=None, **chosen)
    if dense_width % experts.expert_width:
        raise UpcyclingError(
            f"The experts' width moe_ffn_hidden_size={experts.expert_width} does not divide the "
            f"dense feed-forward layer's, {dense_width}. Make it 1/granularity of that."
        )
    return UpcyclingConfig(
        num_moe_experts=experts.num_experts,
        moe_router_topk=experts.topk,
        moe_router_pre_softmax=experts.pre_softmax,
        granularity=dense_width // experts.expert_width,
        moe_layer_freq=1 if all(experts.is_moe) else tuple(map(int, experts.is_moe)),
        moe_shared_expert=experts.has_shared_expert,
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

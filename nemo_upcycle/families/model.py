"""What an upcycled model is, and what upcycling makes of a dense one."""

from dataclasses import asdict, dataclass
from typing import Any

from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.config.layers import moe_layers
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.family import Architecture


@dataclass(frozen=True)
class Experts:
    """What the feed-forward layers of a dense model have become.

    Attributes:
        num_experts: Experts in an MoE layer; 0 where no layer is one.
        topk: Experts per token.
        pre_softmax: Softmax before top-k, whose weights then do not sum to 1.
        expert_width: Neurons of an expert.
        is_moe: Of every layer whether it has experts.
        has_shared_expert: Whether the dense feed-forward layer is kept beside them.
    """

    num_experts: int
    topk: int
    pre_softmax: bool
    expert_width: int
    is_moe: tuple[bool, ...]
    has_shared_expert: bool


@dataclass(frozen=True, kw_only=True)
class MoEModel(Experts):
    """A model, dense or upcycled, as it was trained.

    Attributes:
        arch: The dense model's architecture.
    """

    arch: Architecture


def experts_of(upcycling: UpcyclingConfig, num_layers: int, dense_width: int) -> Experts:
    """Return what feed-forward layers become.

    Args:
        upcycling: What is asked for.
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
    """Return what stays of a dense model."""
    return Experts(0, 0, False, dense_width, (False,) * num_layers, False)


def upcycling_of(experts: Experts, dense_width: int, **chosen: Any) -> UpcyclingConfig:
    """Return what makes feed-forward layers to these experts: the inverse of `experts_of`.

    Args:
        experts: The experts.
        dense_width: Neurons of a dense feed-forward layer.
        chosen: What experts do not show: initialiser, scaling, seed, losses, capacity.

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
    """Return what a dense model becomes.

    Args:
        arch: The dense model's architecture.
        upcycling: What the dense feed-forward layers become.
    """
    return with_experts(arch, experts_of(upcycling, arch.num_layers, arch.ffn_hidden_size))

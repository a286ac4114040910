"""What routers of upcycled models do beyond Megatron-Core: normalize logits, learn densely.

Legend: T tokens, E experts.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch

_LEAST_VARIANCE = 1e-12
"""Added to the variance of a token's logits, which may be 0."""

Routed = tuple[torch.Tensor, torch.Tensor]
"""Weights and choice of experts, both [T, E]."""


def set_up_routers(
    model: torch.nn.Module, logit_normalization: float | None, dense_gradient: bool
) -> None:
    """Set in a model's routers what no field of Megatron's configs can express.

    Args:
        model: A Megatron-Core GPT model, not yet wrapped.
        logit_normalization: See `UpcyclingConfig.router_logit_normalization`.
        dense_gradient: See `UpcyclingConfig.router_dense_gradient`.
    """
    for name, layer in model.named_modules():
        if not name.endswith(".mlp") or not hasattr(layer, "token_dispatcher"):
            continue
        if logit_normalization is not None:
            layer.router.gating = _Normalized(layer.router.gating, logit_normalization)
        if dense_gradient:
            layer.router.routing = _DenseGradient(layer)


class _Normalized:
    """A router's `gating` with normalized logits, [..., E].

    Source: arXiv 2406.06563 Eq. 6.
    """

    def __init__(self, gating: Callable[[torch.Tensor], torch.Tensor], factor: float) -> None:
        self._gating, self._factor = gating, factor

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        logits = self._gating(states)
        centered = logits.float() - logits.float().mean(-1, keepdim=True)
        # Not divided by a root: its gradient is not finite where all logits are equal.
        scale = torch.rsqrt(centered.square().mean(-1, keepdim=True) + _LEAST_VARIANCE)
        return (self._factor * scale * centered).type_as(logits)


class _DenseGradient:
    """A router's `routing` that in training sends all tokens to all experts.

    Experts beyond the top-k get a weight of 0, whose gradient is that of the weight which they
    would have. So forward pass and gradients of experts are those of top-k, and the router learns
    from the outputs of all experts.

    Source: DenseMixer, https://fengyao.notion.site/moe-posttraining; with normalized weights, those
    of the other experts are divided by the same sum, as a constant.
    """

    def __init__(self, layer: torch.nn.Module) -> None:
        self._router, self._dispatcher = layer.router, layer.token_dispatcher
        self._routing, self._config = layer.router.routing, layer.token_dispatcher.config

    def __call__(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Routed:
        weights_TE, chosen_TE = self._routing(logits, *args, **kwargs)
        # The dispatchers compute numbers of tokens from top-k.
        self._dispatcher.config = self._config
        if not self._router.training:
            return weights_TE, chosen_TE
        self._dispatcher.config = copy.copy(self._config)
        self._dispatcher.config.moe_router_topk = chosen_TE.shape[-1]
        others_TE = self._unchosen(logits.view(chosen_TE.shape).float(), chosen_TE)
        straight_TE = (others_TE - others_TE.detach()).type_as(weights_TE)
        return weights_TE + straight_TE, torch.ones_like(chosen_TE)

    def _unchosen(self, logits_TE: torch.Tensor, chosen_TE: torch.Tensor) -> torch.Tensor:
        """Return the weights that experts which were not chosen would have; 0 for the others."""
        is_sigmoid = self._router.score_function == "sigmoid"
        scores_TE = logits_TE.sigmoid() if is_sigmoid else logits_TE.softmax(-1)
        before = self._config.moe_router_pre_softmax
        normalized = self._router.topk > 1 if is_sigmoid else not before
        if normalized:
            scores_TE = scores_TE / (scores_TE * chosen_TE).sum(-1, keepdim=True).detach()
        return scores_TE * ~chosen_TE

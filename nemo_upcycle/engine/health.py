"""How the experts and routers of a model are: load, losses, entropy, and how far they have moved.

Statistics are sums over tokens, added up over all ranks once an interval: they do not depend on how
the model is spread. Any training loop can call them. Legend: L layers, E experts, T tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.moe.moe_utils import (
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
)
from megatron.core.transformer.moe.router import TopKRouter

from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.engine.moved import Moved, first_with_its_router
from nemo_upcycle.engine.owned_shards import owned_shards
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.initializers import initialize_router

LOSSES = {
    "load_balancing_loss": "dp",
    "seq_load_balancing_loss": "dp",
    "global_load_balancing_loss": "none",
    "z_loss": "all",
}
"""Megatron's names, with the ranks over which a loss is a mean; over other ranks, a sum."""


@dataclass(frozen=True)
class Health:
    """Measurements of an interval; NaN for a layer that is not an MoE.

    Attributes:
        load: Share of the assignments to each expert, [L, E].
        values: Metrics by name, [L].
    """

    load: torch.Tensor
    values: Mapping[str, torch.Tensor]

    def scalars(self) -> dict[str, float]:
        """Return `moe/NAME` over all layers, and `moe/NAME_layer_N` per MoE layer."""
        named = {}
        for name, values in self.values.items():
            layers = [(n, float(v)) for n, v in enumerate(values) if not torch.isnan(v)]
            if layers:
                total = sum(value for _, value in layers)
                named[f"moe/{name}"] = total if name == "dead_experts" else total / len(layers)
            named |= {f"moe/{name}_layer_{n}": value for n, value in layers}
        return named


class MoEHealth:
    """Watches the routers of a rank's model; all ranks measure at the same steps.

    `load_balancing_loss`, `z_loss`: Megatron's. `expert_load_cv`: coefficient of variation of the
    experts' loads. `dead_experts`: experts without a token. `dropped_tokens`: share of assignments
    dropped. `router_entropy`: of the scores over all experts, in nats; sigmoid scores are divided
    by their sum. `router_confidence`: the largest score. `expert_bias_range`: the largest minus
    the smallest expert bias, if there is one. `expert_distance`: mean pairwise distance of a
    layer's experts, relative to the dense feed-forward layer's weights. `router_distance`: of the
    router from where it began, relative to that.
    """

    _due = False

    def start_watching(
        self,
        chunks: Sequence[torch.nn.Module],
        config: Any,
        upcycling: UpcyclingConfig | None = None,
    ) -> None:
        """Hook into the routers.

        Args:
            chunks: The rank's Megatron-Core GPT models, unwrapped.
            config: Their config, Megatron's or NeMo's.
            upcycling: What the run was upcycled with, which says where routers began; None in a
                run without upcycling.
        """
        self._config = config
        self._topk, self._experts = config.moe_router_topk, config.num_moe_experts
        self._owned = [own for chunk in chunks for own in owned_shards(chunk)]
        device = self._owned[0].data.device
        self._sums = torch.zeros(config.num_layers, 2 * self._experts + 3, device=device)
        self._not_finite = torch.zeros(config.num_layers, dtype=torch.bool, device=device)
        self._first_router = None if upcycling is None else _router_at_start(upcycling, config)
        modules = [module for chunk in chunks for module in chunk.modules()]
        self._routers = [module for module in modules if isinstance(module, TopKRouter)]
        self._hooks = [router.register_forward_hook(self._watch) for router in self._routers]

    def begin_interval(self) -> None:
        """Add up what the forward passes from here on show, until `measure`."""
        self._due = True
        self._sums.zero_()
        clear_aux_losses_tracker()

    def stop_watching(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _watch(self, router: TopKRouter, inputs: Any, outputs: Any) -> None:
        if not self.counts(router):
            return
        layer, probs = router.layer_number - 1, outputs[0].detach()
        self._not_finite[layer] |= ~torch.isfinite(probs.sum())
        if self._due:
            with torch.no_grad():
                logits = router.gating(inputs[0].detach()).view(-1, self._experts).float()
                scores = _log_scores(router, logits)
                self._sums[layer] += _sums(*scores, outputs[1], self._topk)

    def counts(self, router: TopKRouter) -> bool:
        """Return whether a forward pass counts: one of training, and not the recomputation."""
        return router.training and torch.is_grad_enabled()

    def measure(self) -> Health:
        """Add up over the ranks; every rank calls this, after a backward pass."""
        self._due = False
        sums, losses = self._sums.clone(), _losses(len(self._sums), self._sums.device)
        moved, biases = Moved(self._owned, self._first_router, self._config), self._bias_ranges()
        for values in (sums, losses, biases, *moved.sums):
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(values)
        measures = _of_sums(sums, self._experts, self._topk)
        is_moe = ~torch.isnan(measures["expert_load_cv"])
        for name, values in zip(LOSSES, losses, strict=True):
            if values.any():
                measures[name] = torch.where(is_moe, values, torch.nan)
        if self._config.moe_router_enable_expert_bias:
            measures["expert_bias_range"] = torch.where(is_moe, biases, torch.nan)
        measures |= moved.distances()
        return Health(_load(sums, self._experts).cpu(), {n: v.cpu() for n, v in measures.items()})

    def _bias_ranges(self) -> torch.Tensor:
        """Return this rank's part of the ranges of the experts' biases, [L]."""
        ranges_L = torch.zeros(len(self._sums), device=self._sums.device)
        if self._config.moe_router_enable_expert_bias and first_with_its_router():
            for router in self._routers:
                bias_E = router.expert_bias.float()
                ranges_L[router.layer_number - 1] = bias_E.max() - bias_E.min()
        return ranges_L

    def check_finite(self) -> None:
        """Raise `UpcyclingError` if a router has computed NaN or Inf; names its layer."""
        layers = self._not_finite.nonzero().flatten().tolist()
        if layers:
            raise UpcyclingError(
                f"The router of layer {layers[0]} computes NaN or Inf: the run has diverged. Go on "
                "from a checkpoint before it, with a smaller learning rate or "
                "moe_z_loss_coeff=1e-3."
            )


def _log_scores(router: TopKRouter, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logarithms of scores that sum to 1, and the values that top-k compares."""
    if router.score_function != "sigmoid":
        return logits_TE.log_softmax(-1), logits_TE
    scores_TE = logits_TE.sigmoid()
    logs_TE = torch.nn.functional.logsigmoid(logits_TE) - scores_TE.sum(-1, keepdim=True).log()
    return logs_TE, scores_TE if router.expert_bias is None else scores_TE + router.expert_bias


def _sums(
    logs_TE: torch.Tensor, compared_TE: torch.Tensor, routing_map_TE: torch.Tensor, topk: int
) -> torch.Tensor:
    """Return the sums over tokens, [2E + 3].

    Per expert the tokens kept and the tokens assigned; then the number of tokens, the sum of
    entropies and the sum of largest probabilities.
    """
    scores_TE = logs_TE.exp()
    entropy = -(scores_TE * logs_TE).sum()
    tokens = logs_TE.new_tensor(float(len(logs_TE)))
    chosen_TE = torch.zeros_like(logs_TE).scatter(1, compared_TE.topk(topk).indices, 1)
    rest = torch.stack((tokens, entropy, scores_TE.max(-1).values.sum()))
    # Padding to capacity adds tokens that are not assigned to the expert.
    kept_TE = chosen_TE * routing_map_TE.view(chosen_TE.shape)
    return torch.cat((kept_TE.sum(0), chosen_TE.sum(0), rest))


def _load(sums: torch.Tensor, experts: int) -> torch.Tensor:
    """Return the share of the assignments to each expert, [L, E]."""
    chosen_LE = sums[:, experts : 2 * experts]
    return chosen_LE / chosen_LE.sum(1, keepdim=True)  # 0 / 0 in layers without experts


def _of_sums(sums: torch.Tensor, experts: int, topk: int) -> dict[str, torch.Tensor]:
    """Return the metrics per layer, [L]."""
    kept_LE, chosen_LE = sums[:, :experts], sums[:, experts : 2 * experts]
    tokens_L, entropy_L, confidence_L = sums[:, 2 * experts :].T
    tokens_L = torch.where(tokens_L > 0, tokens_L, torch.nan)
    none = torch.isnan(tokens_L)
    dead = (chosen_LE == 0).sum(1).float()
    return {
        "expert_load_cv": _load(sums, experts).std(1, correction=0) * experts,
        "dead_experts": torch.where(none, torch.nan, dead),
        "dropped_tokens": 1 - kept_LE.sum(1) / (tokens_L * topk),
        "router_entropy": entropy_L / tokens_L,
        "router_confidence": confidence_L / tokens_L,
    }


def _losses(layers: int, device: torch.device) -> torch.Tensor:
    """Return this rank's part of Megatron's auxiliary losses, [len(LOSSES), L]."""
    tracker = get_moe_layer_wise_logging_tracker()
    data = parallel_state.get_data_parallel_world_size()
    ranks = parallel_state.get_tensor_and_context_parallel_world_size() * data
    over = {"dp": data, "all": ranks, "none": 1}
    losses = torch.zeros(len(LOSSES), layers, device=device)
    for index, (name, kind) in enumerate(LOSSES.items()):
        if name in tracker:
            values = tracker[name]["values"][:layers].float()
            losses[index] = values / (get_num_microbatches() * over[kind])
    return losses


def _router_at_start(
    upcycling: UpcyclingConfig, config: Any
) -> Callable[[int], torch.Tensor] | None:
    """Return what gives a layer's router as upcycling makes it, each layer once.

    Returns:
        None if the router's statistics are gone, which a resumed run does not need otherwise.
    """
    rows = (0, config.num_moe_experts)

    @cache
    def router(layer: int) -> torch.Tensor:
        return torch.from_numpy(initialize_router(upcycling, layer, rows, config.hidden_size))

    try:
        router(0)
    except UpcyclingError:
        return None
    return router

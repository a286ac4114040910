"""A dense model and the MoE that it became on the same text: equal, or how far apart and why."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.data.tokenizer import read_documents
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.evaluation.drift import EXACT, Drift
from nemo_upcycle.mapping.moe import MoEModel

TOLERANCES = {
    torch.float32: 1e-5,
    torch.bfloat16: 8 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 8 * torch.finfo(torch.float16).eps,
}
"""Distance of a token's logits, relative to their norm, up to which two models are the same.

The MoE adds up several experts' outputs where the dense model has one: that rounds differently.
"""

ROW_TOKENS = 512
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Parity:
    """How two models agree on the same tokens.

    Attributes:
        tokens: Tokens predicted.
        dense_loss: Mean cross-entropy of the dense model, nats a token.
        moe_loss: That of the MoE.
        kl: Mean KL(dense‖MoE), nats a token.
        top1: Share of tokens for which both predict the same.
        difference: Largest difference of two logits.
        relative: Largest distance of a token's logits, |MoE − dense| / |dense|.
        tolerance: What that may be in an exact model.
    """

    tokens: int
    dense_loss: float
    moe_loss: float
    kl: float
    top1: float
    difference: float
    relative: float
    tolerance: float

    @property
    def exact(self) -> bool:
        """Whether the two compute the same but for rounding."""
        return self.relative <= self.tolerance


def default_text() -> str:
    """Return English text that every Python has: its documentation of the language."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: Path) -> str:
    """Read a text file, or the documents of a JSONL file.

    Raises:
        UpcyclingError: There is none, or it is not UTF-8.
    """
    if path.suffix == ".jsonl":
        return "\n\n".join(text for text, _ in read_documents(path))
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UpcyclingError(f"{path} cannot be read as text: {error}.") from error


def rows_of(
    text: str, tokenizer: PreTrainedTokenizerBase, tokens: int, max_length: int
) -> torch.Tensor:
    """Return the first tokens of a text as rows.

    Args:
        text: The text.
        tokenizer: The models'.
        tokens: Tokens to predict, at most.
        max_length: Tokens of a row that the models take.

    Returns:
        Ids [rows, length + 1].

    Raises:
        UpcyclingError: The text is too short for a row.
    """
    length = min(ROW_TOKENS, max_length, tokens)
    # So much text is more than enough tokens: none is longer on average.
    ids = tokenizer(text[: 16 * (tokens + 1)], return_tensors="pt")["input_ids"][0]
    count = min(tokens, len(ids) - 1) // length
    if count < 1:
        raise UpcyclingError(
            f"The text has {len(ids)} tokens; expected more than {length}. Give a longer one, or a "
            "smaller --tokens."
        )
    return ids[: count * length + 1].unfold(0, length + 1, length)


@torch.no_grad()
def compare(
    dense: PreTrainedModel,
    moe: PreTrainedModel,
    ids: torch.Tensor,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Parity:
    """Run both models over the same tokens.

    Args:
        dense: The dense model.
        moe: The MoE.
        ids: [rows, length + 1].
        batch_size: Rows at a time.
        progress: Called with rows done and to do.

    Raises:
        UpcyclingError: The vocabularies differ.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    difference = relative = 0.0
    for index, batch in enumerate(ids.split(batch_size)):
        labels = batch[:, 1:]
        one, other = (
            model(batch[:, :-1].to(model.device)).logits.float().cpu() for model in (dense, moe)
        )
        if one.shape != other.shape:
            raise UpcyclingError(
                f"The dense model has {one.shape[-1]} tokens in its vocabulary, the MoE "
                f"{other.shape[-1]}; expected the same."
            )
        sums += torch.stack(list(_sums(one, other, labels)))
        difference = max(difference, float((one - other).abs().max()))
        distances = (one - other).norm(dim=-1) / one.norm(dim=-1).clamp(min=1e-30)
        relative = max(relative, float(distances.max()))
        if progress:
            progress(index * batch_size + len(batch), len(ids))
    count = ids[:, 1:].numel()
    tolerance = max(TOLERANCES.get(model.dtype, 1e-5) for model in (dense, moe))
    dense_loss, moe_loss, kl, same = (float(value) / count for value in sums)
    return Parity(count, dense_loss, moe_loss, kl, same, difference, relative, tolerance)


def _sums(one: torch.Tensor, other: torch.Tensor, labels: torch.Tensor) -> Iterable[torch.Tensor]:
    dense, moe = (logits.double().log_softmax(-1) for logits in (one, other))
    for log_p in (dense, moe):
        yield -log_p.gather(-1, labels[..., None]).sum()
    yield (dense.exp() * (dense - moe)).sum()
    yield (one.argmax(-1) == other.argmax(-1)).sum().double()


def reasons(found: Drift, model: MoEModel, dense_ffn: int) -> Iterator[str]:
    """Yield why an MoE does not compute what the dense model computes.

    Args:
        found: How far its weights are from the dense ones.
        model: The MoE.
        dense_ffn: Neurons of the dense feed-forward layer.
    """
    if found.others > EXACT:
        yield (
            f"attention, norms, embeddings or dense layers have changed by up to "
            f"{found.others:.2%}: it was trained on, or is another dense model's"
        )
    if found.experts > EXACT:
        yield (
            f"experts are up to {found.experts:.2%} from the dense layer: trained, or changed by "
            "an initializer"
        )
    if found.untouched:
        yield from _at_step_0(found, model, dense_ffn)


def _at_step_0(found: Drift, model: MoEModel, dense_ffn: int) -> Iterator[str]:
    """Yield what upcycling itself says of the choices that show in the model."""
    granularity = dense_ffn // model.expert_width
    config = UpcyclingConfig(
        num_moe_experts=model.num_experts,
        granularity=granularity,
        moe_router_topk=model.topk,
        moe_router_pre_softmax=model.pre_softmax,
        moe_shared_expert=model.has_shared_expert,
    )
    down = found.scales.get("down", 1.0)
    near = {
        name: abs(config_of.scales(gated=True).down - down)
        + abs(config_of.scales(gated=True).gate - found.scales.get("gate", 1.0))
        for name in ("exact", "paper", "none")
        for config_of in [replace(config, weight_scaling=name)]
    }
    chosen = replace(config, weight_scaling=min(near, key=lambda name: near[name]))
    exactness = chosen.exactness(model.arch.gated_linear_unit, 1)
    if not exactness.exact:
        yield exactness.reason
    elif granularity > 1:
        yield (
            "the router does not give the shards of a copy the same weight "
            "(router_initializer='virtual_groups' does)"
        )

"""Parity of a dense model and its upcycled MoE on the same text: distances and reasons."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.data.tokenizer import read_documents
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.evaluation.rounding import reorder
from nemo_upcycle.families import Architecture
from nemo_upcycle.families.family import MULTIPLIERS
from nemo_upcycle.families.model import MoEModel, upcycling_of
from nemo_upcycle.progress import Progress
from nemo_upcycle.trained.drift import EXACT, Drift

MULTIPLE = 4
"""Allowed difference of the MoE, as a multiple of the effect of rounding on the dense model.

The MoE sums weighted outputs of several experts instead of one output. On one rank, the two
models also use different attention implementations. The measured effect is 0.6 to 1.4 times that
of rounding, in fp32.
"""

ROW_TOKENS = 512
WINDOWS = 1.5
"""Ratio of row length to window: the last third of a row cannot attend to the first tokens."""

_NUMBERS = (
    *("rotary_base", "rope_scaling", "seq_len_interpolation_factor", "rotary_percent"),
    *("nope_layers", "attention_multiplier", *MULTIPLIERS),
    *("normalization", "layernorm_epsilon", "sliding_window", "activation"),
    *("num_attention_heads", "num_query_groups", "kv_channels"),
)
"""Architecture fields that affect the result but have no weights."""

KEPT_BYTES = 2**30
"""Maximum size of the logits kept for comparison with the reordered model."""


@dataclass(frozen=True)
class Parity:
    """Agreement of two models on the same tokens.

    Attributes:
        tokens: Number of predicted tokens.
        dense_loss: Mean cross-entropy of the dense model, in nats per token.
        moe_loss: Mean cross-entropy of the MoE, in nats per token.
        kl: Mean KL(dense‖MoE), in nats per token.
        top1: Share of tokens with the same most likely prediction.
        difference: Largest absolute difference of two logits.
        relative: Largest relative distance of a token's logits, |MoE − dense| / |dense|.
        rounding: The same distance between the dense model and its reordered copy.
        tolerance: Maximum of `relative` for an exact model.
    """

    tokens: int
    dense_loss: float
    moe_loss: float
    kl: float
    top1: float
    difference: float
    relative: float
    rounding: float
    tolerance: float

    @property
    def exact(self) -> bool:
        """Whether the two models agree up to rounding."""
        return self.relative <= self.tolerance


def default_text() -> str:
    """Return English text from every Python installation: the language reference."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: Path) -> str:
    """Read a text file, or the documents of a JSONL file.

    Raises:
        UpcyclingError: The file is missing or not UTF-8.
    """
    if path.suffix == ".jsonl":
        return "\n\n".join(text for text, _ in read_documents(path))
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UpcyclingError(f"{path} cannot be read as text: {error}.") from error


def length_beyond(tokens: int, *models: Architecture) -> int:
    """Return the row length that reveals differences at distant tokens.

    Args:
        tokens: Maximum row length beyond the context before a RoPE scaling. A sliding window is
            exceeded whatever the length of the window.
        models: The models' architectures; a feature of only one model counts too.

    Returns:
        Tokens per row; 0 if any length is sufficient.
    """
    scalings = [arch.rope_scaling or {} for arch in models]
    befores = [int(s.get("original_max_position_embeddings", 0) * WINDOWS) for s in scalings]
    windows = [math.ceil((arch.sliding_window or 0) * WINDOWS) for arch in models]
    return max([0, *windows, *(before for before in befores if before <= tokens)])


def rows_of(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    max_length: int,
    beyond: int = 0,
) -> torch.Tensor:
    """Return the first tokens of a text as rows.

    Args:
        text: The text.
        tokenizer: The models' tokenizer.
        tokens: Maximum number of tokens to predict; at least one row is returned.
        max_length: Maximum number of tokens per row.
        beyond: Minimum row length; see `length_beyond`. A shorter text becomes one row.

    Returns:
        Token ids [rows, length + 1].

    Raises:
        UpcyclingError: The text is too short for a row.
    """
    length = min(max(beyond, min(ROW_TOKENS, tokens)), max_length)
    tokens = max(tokens, length)
    # Always enough text: no tokenizer averages more than 16 characters per token.
    ids = tokenizer(text[: 16 * (tokens + 1)], return_tensors="pt")["input_ids"][0]
    if ROW_TOKENS < len(ids) <= length:
        length = len(ids) - 1
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
    """Run both models on the same tokens.

    Args:
        dense: The dense model; its hidden units are permuted in place.
        moe: The MoE.
        ids: Token ids [rows, length + 1].
        batch_size: Rows per batch.
        progress: Called with the steps done and the steps in total.

    Raises:
        UpcyclingError: The vocabulary sizes differ.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    difference = relative = 0.0
    kept: list[torch.Tensor] = []
    batches = ids.split(max(1, batch_size * ROW_TOKENS // ids.shape[1]))
    room = KEPT_BYTES
    steps = 2 * len(batches)
    for done, batch in enumerate(batches, 1):
        one, other = (_logits(model, batch) for model in (dense, moe))
        if one.shape != other.shape:
            raise UpcyclingError(
                f"The dense model has {one.shape[-1]} tokens in its vocabulary, the MoE "
                f"{other.shape[-1]}; expected the same."
            )
        sums += _sums(one, other, batch[:, 1:])
        difference = max(difference, float((one - other).abs().max()))
        relative = max(relative, _distance(one, other))
        room -= one.nbytes
        if room > 0 or not kept:
            kept.append(one)
        if progress:
            progress(done, steps)
    reorder(dense, dense.config.hidden_size)
    rounding = 0.0
    for batch, before in zip(batches, kept, strict=False):
        rounding = max(rounding, _distance(before, _logits(dense, batch)))
    if progress:
        progress(steps, steps)
    count = ids[:, 1:].numel()
    dense_loss, moe_loss, kl, same = (float(value) / count for value in sums)
    tolerance = _tolerance(rounding, max(torch.finfo(m.dtype).eps for m in (dense, moe)))
    return Parity(count, dense_loss, moe_loss, kl, same, difference, relative, rounding, tolerance)


def _logits(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    return model(batch[:, :-1].to(model.device)).logits.float().cpu()


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    distances = (one - other).norm(dim=-1) / one.norm(dim=-1).clamp(min=1e-30)
    return float(distances.max())


def _tolerance(rounding: float, eps: float) -> float:
    """Return the maximum relative distance that rounding explains.

    At least 8 ulps: in half precision each expert's output is rounded once more, which reordering
    does not reveal. At most half of the dtype's digits: a larger tolerance would detect nothing.
    """
    return min(max(8 * eps, MULTIPLE * rounding), max(8 * eps, eps**0.5))


def _sums(one: torch.Tensor, other: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum losses, KL and agreement in chunks of tokens, because fp64 needs much memory."""
    sums = torch.zeros(4, dtype=torch.float64)
    parts = (x.flatten(0, 1).split(ROW_TOKENS) for x in (one, other, labels))
    for dense, moe, wanted in zip(*parts, strict=True):
        p, q = (logits.double().log_softmax(-1) for logits in (dense, moe))
        sums += torch.stack(
            [
                -p.gather(-1, wanted[:, None]).sum(),
                -q.gather(-1, wanted[:, None]).sum(),
                (p.exp() * (p - q)).sum(),
                (dense.argmax(-1) == moe.argmax(-1)).sum().double(),
            ]
        )
    return sums


def reasons(
    drift: Drift, model: MoEModel, dense: Architecture, dense_checkpoints: int
) -> Iterator[str]:
    """Yield the reasons why an MoE differs from the dense model.

    Args:
        drift: Distance of the MoE's weights from the dense weights.
        model: The MoE.
        dense: The dense model's architecture.
        dense_checkpoints: Number of dense models that the MoE was made from.
    """
    if dense_checkpoints > 1:
        yield (
            f"experts come from {dense_checkpoints} dense models, and everything else is their "
            "average"
        )
    elif drift.others > EXACT:
        yield (
            f"attention, norms, embeddings or dense layers have changed by up to "
            f"{drift.others:.2%}: it was trained on, or is another dense model's"
        )
    if drift.experts > EXACT:
        yield (
            f"experts are up to {drift.experts:.2%} from the dense layer: trained, or changed by "
            "an initializer"
        )
    if drift.untouched:
        yield from _at_step_0(drift, model, dense, dense_checkpoints)


def other_numbers(moe: Architecture, dense: Architecture) -> Iterator[str]:
    """Yield the differing architecture fields that no weight reveals.

    The text may not reveal these fields either: a window may be longer than the rows.
    """
    for name in _NUMBERS:
        here, there = getattr(moe, name), getattr(dense, name)
        if here != there:
            yield f"its {name} is {here}, the dense model's {there}"


def _at_step_0(
    drift: Drift, model: MoEModel, dense: Architecture, dense_checkpoints: int
) -> Iterator[str]:
    """Yield the reasons due to the upcycling settings, inferred from the weights' scales."""
    config = upcycling_of(model, dense.ffn_hidden_size)
    gated = dense.gated_linear_unit
    # Squared ReLU has no gate; the scales of up and down suffice.
    shown = ("gate", "up", "down") if gated else ("up", "down")
    choices = [replace(config, weight_scaling=name) for name in ("exact", "paper", "none")]

    def apart(choice: UpcyclingConfig) -> float:
        scales = choice.scales(gated)
        return sum(abs(getattr(scales, part) - drift.scales.get(part, 1.0)) for part in shown)

    exactness = min(choices, key=apart).exactness(gated, dense_checkpoints)
    if not exactness.exact:
        yield exactness.reason
    elif config.granularity > 1:
        yield (
            "the router does not give the shards of a copy the same weight "
            "(router_initializer='virtual_groups' does)"
        )

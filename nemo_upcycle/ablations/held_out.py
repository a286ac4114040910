"""The loss on held-out text, and the accuracy in `next_line`, of a model that is being trained.

Legend of the shapes: R rows, L tokens per row, V vocabulary.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.transformer.moe.router import TopKRouter

from nemo_upcycle.data.paths import DataPath
from nemo_upcycle.errors import UpcyclingError


class HeldOut:
    """Held-out text: the documents of a blend after the training split.

    Args:
        paths: The blend.
        split: Megatron's split; all but the first part is held out.
        seq_length: Tokens per row.
        rows: Rows per corpus.
        rows_at_once: Rows per forward pass.

    Raises:
        UpcyclingError: A corpus holds out less than a row.
    """

    def __init__(
        self, paths: Sequence[DataPath], split: str, seq_length: int, rows: int, rows_at_once: int
    ) -> None:
        weights = [1.0 if path.weight is None else path.weight for path in paths]
        self.weights = [weight / sum(weights) for weight in weights]
        self.corpora = [_rows(path.prefix, split, seq_length, rows) for path in paths]
        self.tokens = sum(corpus.shape[0] * seq_length for corpus in self.corpora)
        self._at_once = rows_at_once

    @torch.no_grad()
    def loss(self, model: torch.nn.Module) -> float:
        """Return the mean language-model loss, with corpora weighted as in the blend."""
        parts = zip(self.weights, self.corpora, strict=True)
        return sum(weight * self._loss(model, corpus) for weight, corpus in parts)

    def _loss(self, model: torch.nn.Module, rows: torch.Tensor) -> float:
        total = 0.0
        for part in rows.split(self._at_once):
            logits_RLV, targets_RL = _logits(model, part[:, :-1]), part[:, 1:]
            total += float(
                torch.nn.functional.cross_entropy(
                    logits_RLV.flatten(0, 1),
                    targets_RL.flatten().to(logits_RLV.device),
                    reduction="sum",
                )
            )
        return total / rows[:, 1:].numel()


def _logits(model: torch.nn.Module, ids_RL: torch.Tensor) -> torch.Tensor:
    """Return logits in fp32, [R, L, V]; without a mask, attention is causal."""
    ids_RL = ids_RL.contiguous().to(next(model.parameters()).device)
    positions = torch.arange(ids_RL.shape[1], device=ids_RL.device).expand_as(ids_RL)
    return model(ids_RL, positions, attention_mask=None).float()


def _rows(path: str, split: str, seq_length: int, most: int) -> torch.Tensor:
    """Return rows of a corpus's held-out documents, [R, L + 1]; adjacent rows share a token."""
    corpus = IndexedDataset(path)
    parts = [float(part) for part in split.split(",")]
    count = len(corpus.sequence_lengths)
    first = round(parts[0] / sum(parts) * count)
    tokens: list[np.ndarray] = []
    while first < count and sum(map(len, tokens)) <= most * seq_length:
        tokens.append(corpus[first])
        first += 1
    ids = torch.from_numpy(np.concatenate(tokens or [np.zeros(0)]).astype(np.int64))
    if len(ids) <= seq_length:
        raise UpcyclingError(
            f"{path} holds out {len(ids)} tokens; expected more than {seq_length}. Use a larger "
            "corpus."
        )
    return ids.unfold(0, seq_length + 1, seq_length)[:most]


class Questions:
    """Multiple-choice questions as `data choices` writes them, scored as lm-eval scores `acc`.

    A choice's score is the sum of the log-probabilities of its tokens after the context. lm-eval
    itself needs a saved model.

    Args:
        items: The questions' JSONL file.
        tokenizer: A tokenizer of transformers.
        rows_at_once: Rows per forward pass.
    """

    def __init__(self, items: Path, tokenizer: Any, rows_at_once: int) -> None:
        self._at_once = rows_at_once
        self.labels: list[int] = []
        self.rows: list[tuple[int, int, list[int], int]] = []
        for number, line in enumerate(items.read_text(encoding="utf-8").splitlines()):
            item = json.loads(line)
            self.labels.append(item["label"])
            before = len(_ids(tokenizer, item["context"]))
            for choice, text in enumerate(item["choices"]):
                self.rows.append((number, choice, _ids(tokenizer, item["context"] + text), before))
        # Rows of about equal length together, the longest first.
        self.rows.sort(key=lambda row: -len(row[2]))

    @torch.no_grad()
    def accuracy(self, model: torch.nn.Module) -> float:
        """Return the share of questions whose right choice has the highest score."""
        scores: list[dict[int, float]] = [{} for _ in self.labels]
        for at in range(0, len(self.rows), self._at_once):
            part = self.rows[at : at + self._at_once]
            ids_RL = torch.zeros(len(part), len(part[0][2]), dtype=torch.long)
            for row, (_, _, ids, _) in enumerate(part):
                ids_RL[row, : len(ids)] = torch.tensor(ids)  # causal: padding at the end is unseen
            known_RLV = _logits(model, ids_RL).log_softmax(-1)[:, :-1]
            found_RL = known_RLV.gather(2, ids_RL[:, 1:, None].to(known_RLV.device))[..., 0].cpu()
            for row, (number, choice, ids, before) in enumerate(part):
                scores[number][choice] = float(found_RL[row, before - 1 : len(ids) - 1].sum())
        best = [max(sorted(each), key=each.__getitem__) for each in scores]
        right = sum(one == label for one, label in zip(best, self.labels, strict=True))
        return right / len(self.labels)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass
class Assigned:
    """A forward hook that counts the assignments of routers, before and after dropping."""

    wanted: int = 0
    kept: int = 0

    def __call__(self, router: TopKRouter, inputs: Any, outputs: Any) -> None:
        self.wanted += inputs[0].shape[:-1].numel() * router.topk
        self.kept += int(outputs[1].sum())


@contextmanager
def dropless(model: torch.nn.Module) -> Iterator[list[TopKRouter]]:
    """Disable the capacity factor temporarily, because transformers drops no tokens."""
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    configs = {id(router.config): router.config for router in routers}.values()
    before = [config.moe_expert_capacity_factor for config in configs]
    for config in configs:
        config.moe_expert_capacity_factor = None
    try:
        yield routers
    finally:
        for config, factor in zip(configs, before, strict=True):
            config.moe_expert_capacity_factor = factor

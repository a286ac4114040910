"""The logits of upcycled models at step 0 against those of the dense model."""

from pathlib import Path

import torch

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from tests.distributed import scenarios
from tests.distributed.pool import RankPool, nemo_recipe
from tests.tiny import tokens

TOLERANCE = 1e-5
IDS = tokens(rows=2, length=48)

FOLDED = ParallelFolding(
    tensor_model_parallel_size=2,
    pipeline_model_parallel_size=2,
    expert_model_parallel_size=2,
    expert_tensor_parallel_size=1,
)


def dense_logits(dense: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(ids).logits


@nemo_recipe
def opened_logits(source: Path, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of a model that is opened as `evaluate` opens a model."""
    from nemo_upcycle.evaluation.opening import open_model

    with torch.no_grad():
        return open_model(source)(input_ids=ids).logits


def error(outputs: list[scenarios.Logits | None], dense: Path, ids: torch.Tensor) -> float:
    """Return how far ranks are at most from the dense model, and check that none leaves a gap."""
    expected = dense_logits(dense, ids)
    seen = torch.zeros(ids.shape[1], dtype=torch.bool)
    largest = 0.0
    for positions, logits in filter(None, outputs):
        seen[positions] = True
        largest = max(largest, float((logits - expected[:, positions]).abs().max()))
    assert seen.all()
    return largest


def difference(
    ranks: RankPool,
    dense: Path,
    world_size: int,
    folding: ParallelFolding,
    upcycling: UpcyclingConfig | None = None,
    damage: str | None = None,
) -> float:
    outputs = ranks.run(
        scenarios.step0_logits,
        world_size,
        dense=dense,
        folding=folding,
        upcycling=upcycling or UpcyclingConfig(),
        ids=IDS,
        damage=damage,
    )
    return error(outputs, dense, IDS)

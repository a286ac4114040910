"""Where Megatron by itself computes something else at the edges, or stops."""

from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from tests.distributed.grid import IDS
from tests.distributed.pool import RankPool
from tests.distributed.training import train
from tests.tiny import write_llama
from tests.workspace import VOCAB_SIZE, make_workspace

TOLERANCE = 1e-5


def step(forget_marks: bool = False, **arguments: Any) -> tuple[list[float], float]:
    """Upcycle and run one step; return the loss, summed, with its tokens, and gradient norm.

    Args:
        forget_marks: Build experts whose parameters are not marked `tensor_model_parallel`, as
            Transformer Engine from 2.13 on builds them.
        arguments: Of `scenarios.upcycled_step`.
    """
    from unittest.mock import patch

    from megatron.core.transformer.moe.experts import SequentialMLP

    from tests.distributed import scenarios

    build = SequentialMLP.__init__

    def without_marks(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        for parameter in self.parameters():
            del parameter.tensor_model_parallel

    with patch.object(SequentialMLP, "__init__", without_marks if forget_marks else build):
        loss, norm = scenarios.upcycled_step(**arguments)
    return loss.tolist(), norm


def mean_loss(results: list[tuple[list[float], float]]) -> float:
    """Return the mean over the tokens of all data-parallel ranks and pipeline stages."""
    return sum(loss[0] for loss, _ in results) / sum(loss[1] for loss, _ in results)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_vocabularys_padding_is_no_part_of_the_softmax(
    ranks: RankPool, tmp_path: Path, tied: bool
) -> None:
    dense = write_llama(tmp_path, vocab_size=255, tie_word_embeddings=tied)
    given = {"dense": dense, "upcycling": UpcyclingConfig(), "ids": IDS.clamp(max=254)}
    one = ranks.run(step, 1, folding=ParallelFolding(), **given)
    # On 4 ranks the padding is the last rank's alone.
    for world_size, tp in ((2, 2), (4, 4)):
        folding = ParallelFolding.of(tp=tp, etp=1)
        results = ranks.run(step, world_size, folding=folding, **given)
        assert mean_loss(results) == pytest.approx(mean_loss(one), rel=TOLERANCE)
        assert [norm for _, norm in results] == pytest.approx(
            [one[0][1]] * world_size, rel=TOLERANCE
        )


def test_experts_that_megatron_has_not_marked_are_counted_in_the_gradient_norm(
    ranks: RankPool, dense: Path
) -> None:
    """TP2 EP4 ETP1: half of the experts are on ranks that are not the first of their TP group."""
    given = {"dense": dense, "upcycling": UpcyclingConfig(), "ids": IDS}
    ((_, expected),) = ranks.run(step, 1, folding=ParallelFolding(), **given)
    folding = ParallelFolding.of(tp=2, ep=4, etp=1)
    results = ranks.run(step, 4, folding=folding, forget_marks=True, **given)
    assert [norm for _, norm in results] == pytest.approx([expected] * 4, rel=TOLERANCE)


CAPACITIES = {
    "E4T2, 4": {"num_moe_experts": 4, "moe_expert_capacity_factor": 4.0},
    "E8T4, 4": {"moe_router_topk": 4, "moe_expert_capacity_factor": 4.0},
    "E8T2, 8": {"moe_expert_capacity_factor": 8.0},
    "E8T2, 8, padded": {
        "moe_expert_capacity_factor": 8.0,
        "moe_pad_expert_input_to_capacity": True,
    },
    # 14/255 · 255/14 is a little more than 1.
    "E255T14, rounding": {
        "num_moe_experts": 255,
        "moe_router_topk": 14,
        "moe_expert_capacity_factor": 255 / 14,
    },
}


def steps(dense: Path, choices: dict[str, dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return loss and gradient norm of each choice with its capacity, and without one."""
    from dataclasses import replace

    found = {}
    for name, choice in choices.items():
        limited = UpcyclingConfig(**choice)
        dropless = replace(
            limited, moe_expert_capacity_factor=None, moe_pad_expert_input_to_capacity=False
        )
        found[name] = tuple(
            mean_loss([step(dense=dense, folding=ParallelFolding(), upcycling=each, ids=IDS)])
            for each in (limited, dropless)
        )
    return found


def test_a_capacity_above_the_tokens_is_dropless(ranks: RankPool, tmp_path: Path) -> None:
    dense = write_llama(tmp_path, num_hidden_layers=1)  # each drops tokens by itself
    (found,) = ranks.run(steps, 1, dense=dense, choices=CAPACITIES)
    assert found.keys() == CAPACITIES.keys()
    for name, (limited, dropless) in found.items():
        assert limited == pytest.approx(dropless, rel=1e-6), name


@pytest.mark.thorough
def test_a_capacity_above_the_tokens_trains(ranks: RankPool, tmp_path: Path) -> None:
    """Through the recipe, and where the model's config alone is told."""
    workspace = make_workspace(tmp_path)
    (result,) = ranks.run(
        train,
        1,
        directory=workspace,
        options={"max_steps": 1},
        overrides={"model.config.moe_expert_capacity_factor": 8.0, "log.ckpt": None},
    )
    assert not isinstance(result, str), result


@pytest.mark.thorough
def test_a_vocabulary_that_tp_does_not_divide_is_trained_on_densely(
    ranks: RankPool, tmp_path: Path
) -> None:
    """The control of an upcycled run, which pads; NeMo's own Llama does not."""
    workspace = make_workspace(tmp_path)
    dense = write_llama(tmp_path / "odd", vocab_size=VOCAB_SIZE + 1)
    losses = []
    for world_size, tp in ((1, 1), (2, 2)):
        options = {
            "name": f"tp{tp}",
            "dense_checkpoint": str(dense),
            "tokenizer": str(workspace / "tokenizer"),
            "max_steps": 1,
            "tensor_model_parallel_size": tp,
        }
        results = ranks.run(
            train,
            world_size,
            directory=workspace,
            options=options,
            overrides={"log.ckpt": None, "trainer.limit_val_batches": 0},
            factory="dense_recipe",
        )
        assert not isinstance(results[0], str), results
        losses.append(results[0][0])
    assert losses[1] == pytest.approx(losses[0], rel=TOLERANCE)

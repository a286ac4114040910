"""The layout says of a model that is not built what Megatron says of one that is."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from megatron.core import parallel_state

from nemo_upcycle.checkpoint import open_checkpoint
from nemo_upcycle.checkpoint.described import open_dense
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.engine import load
from nemo_upcycle.engine.owned_shards import owned_shards
from nemo_upcycle.families import Architecture, family_of
from nemo_upcycle.plans.job import plan_job
from nemo_upcycle.plans.layout import Coordinates, coordinates, shards
from nemo_upcycle.plans.rank import Shard
from tests.distributed import scenarios
from tests.distributed.pool import RankPool
from tests.tiny import CONFIG

MOE = UpcyclingConfig(num_moe_experts=8)
DENSE = UpcyclingConfig(num_moe_experts=None)
ACTIVATIONS = {"nemotron": {"hidden_act": "relu2"}}
TIED = {"tie_word_embeddings": True}


def case(
    world_size: int, upcycling: UpcyclingConfig = MOE, model: Any = None, **folding: Any
) -> Any:
    """Return a case, named after its folding in the usual abbreviations."""
    letters = {
        name: "".join(word[0] for word in name.split("_")[:2]) + str(size)
        for name, size in folding.items()
    }
    of_model = (str(v) if k == "model_type" else k for k, v in (model or {}).items())
    name = "-".join([str(world_size), *letters.values(), *of_model])
    if upcycling is not MOE:
        name += "-" + ("dense" if upcycling is DENSE else upcycling.label.replace(" ", "-"))
    return pytest.param(world_size, upcycling, model or {}, ParallelFolding(**folding), id=name)


CASES = [
    case(1),
    case(1, DENSE),
    case(1, MOE, TIED),
    case(1, UpcyclingConfig(num_moe_experts=4)),
    case(2),
    case(2, expert_model_parallel_size=2),
    case(2, tensor_model_parallel_size=2),
    case(2, expert_tensor_parallel_size=2),
    case(2, tensor_model_parallel_size=2, expert_tensor_parallel_size=2),
    case(2, tensor_model_parallel_size=2, expert_model_parallel_size=2),
    case(2, MOE, {"vocab_size": 255}, tensor_model_parallel_size=2),
    case(2, MOE, {"vocab_size": 255} | TIED, tensor_model_parallel_size=2),
    case(2, DENSE, tensor_model_parallel_size=2),
    case(2, DENSE, {"vocab_size": 255}, tensor_model_parallel_size=2),
    case(2, MOE, {"head_dim": 32}, tensor_model_parallel_size=2),
    case(2, pipeline_model_parallel_size=2),
    case(2, MOE, TIED, pipeline_model_parallel_size=2),
    case(2, DENSE, TIED, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    case(
        2,
        MOE,
        TIED,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
    ),
    case(2, pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=1),
    case(2, pipeline_model_parallel_size=2, num_layers_in_last_pipeline_stage=1),
    case(
        2,
        DENSE,
        pipeline_model_parallel_size=2,
        num_layers_in_first_pipeline_stage=3,
        num_layers_in_last_pipeline_stage=1,
    ),
    case(
        2,
        MOE,
        {"num_hidden_layers": 3},
        pipeline_model_parallel_size=2,
        account_for_embedding_in_pipeline_split=True,
    ),
    case(
        2,
        MOE,
        {"num_hidden_layers": 3} | TIED,
        pipeline_model_parallel_size=2,
        account_for_loss_in_pipeline_split=True,
    ),
    case(
        2,
        MOE,
        {"num_hidden_layers": 6},
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        num_layers_in_first_pipeline_stage=2,
    ),
    case(
        2,
        MOE,
        {"num_hidden_layers": 6},
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        account_for_embedding_in_pipeline_split=True,
        account_for_loss_in_pipeline_split=True,
    ),
    case(4, expert_model_parallel_size=4),
    case(
        4,
        tensor_model_parallel_size=4,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=2,
    ),
    case(4, MOE, TIED, expert_model_parallel_size=2, expert_tensor_parallel_size=2),
    case(4, tensor_model_parallel_size=2, expert_tensor_parallel_size=4),
    case(
        4,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=2,
    ),
    case(
        4,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        expert_tensor_parallel_size=2,
    ),
    case(4, pipeline_model_parallel_size=4),
    case(
        4,
        MOE,
        {"num_hidden_layers": 8} | TIED,
        pipeline_model_parallel_size=4,
        num_layers_in_first_pipeline_stage=1,
        num_layers_in_last_pipeline_stage=3,
    ),
    case(
        4,
        MOE,
        {"num_hidden_layers": 6},
        pipeline_model_parallel_size=4,
        account_for_embedding_in_pipeline_split=True,
        account_for_loss_in_pipeline_split=True,
    ),
]


FOLDED = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "expert_model_parallel_size": 2,
}
GRANULAR = UpcyclingConfig(num_moe_experts=16, granularity=4, moe_router_topk=4)
MIXED = replace(GRANULAR, moe_shared_expert=True, moe_layer_freq=(0, 1, 1, 0))
CASES += [
    case(world_size, upcycling, {"model_type": family}, **folding)
    for family in ("mistral", "qwen2", "qwen3", "nemotron")
    for world_size, upcycling, folding in ((1, DENSE, {}), (4, MIXED, FOLDED))
]
BIASED = replace(
    MIXED,
    moe_shared_expert=False,
    moe_shared_expert_intermediate_size=0.5,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
)
CASES += [
    case(1, MIXED),
    case(2, BIASED, tensor_model_parallel_size=2, expert_tensor_parallel_size=1),
    case(4, BIASED, **FOLDED),
    case(2, GRANULAR, expert_tensor_parallel_size=2),
    case(4, MIXED, tensor_model_parallel_size=2, expert_tensor_parallel_size=4),
    case(4, MIXED, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
]


def built(
    arch: Architecture, folding: ParallelFolding, upcycling: UpcyclingConfig
) -> tuple[Coordinates, list[Shard]]:
    """Return where Megatron has put this rank, and what of the model is here."""
    chunks = scenarios.build_from(arch, folding, upcycling)
    place = Coordinates(
        tp=parallel_state.get_tensor_model_parallel_rank(),
        cp=parallel_state.get_context_parallel_rank(),
        dp=parallel_state.get_data_parallel_rank(),
        pp=parallel_state.get_pipeline_model_parallel_rank(),
        etp=parallel_state.get_expert_tensor_parallel_rank(),
        ep=parallel_state.get_expert_model_parallel_rank(),
        edp=parallel_state.get_expert_data_parallel_rank(),
    )
    return place, [own.shard for chunk in chunks for own in owned_shards(chunk)]


@pytest.mark.parametrize(("world_size", "upcycling", "model", "folding"), CASES)
def test_layout_is_megatrons(
    ranks: RankPool,
    world_size: int,
    upcycling: UpcyclingConfig,
    model: dict[str, Any],
    folding: ParallelFolding,
) -> None:
    config = {**CONFIG, "model_type": "llama", **model}
    arch = family_of(config).architecture(config | ACTIVATIONS.get(config["model_type"], {}))
    found = ranks.run(built, world_size, arch=arch, folding=folding, upcycling=upcycling)
    for rank, (place, owned) in enumerate(found):
        assert coordinates(folding, world_size, rank) == place
        assert Counter(shards(arch, upcycling, folding, world_size, rank)) == Counter(owned)


def loaded(
    dense: Path, folding: ParallelFolding, upcycling: UpcyclingConfig
) -> tuple[int, int, int]:
    """Upcycle; return this rank's parameters, the bytes it read and the shards it wrote."""
    chunks = scenarios.build(dense, folding, upcycling)
    report = load.fill(chunks, open_checkpoint(str(dense)), upcycling)
    parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    return parameters, report.bytes_read, report.shards


def test_sizes_known_before_are_those_of_loading(ranks: RankPool, dense: Path) -> None:
    folding = ParallelFolding(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=2,
    )
    job = plan_job(open_dense(str(dense)), MOE, folding, 1, 4, "32")
    planned = [job.of_rank(rank) for rank in range(4)]
    assert ranks.run(loaded, 4, dense=dense, folding=folding, upcycling=MOE) == [
        (own.parameters, own.bytes_to_read, len(own.shards)) for own in planned
    ]

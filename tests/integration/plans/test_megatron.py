"""What every rank has and which ranks go together, against Megatron's own functions."""

from types import SimpleNamespace
from typing import Any

import pytest
from nemo_upcycle_recipes.numbers import LLAMA3_8B_E8T2

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.plans.groups import KINDS, PURPOSES, rank_groups
from nemo_upcycle.plans.layout import coordinates, stage_layers
from tests.distributed.foldings import FOLDINGS, spread

MAPPINGS = {
    "the paper's, 512": (LLAMA3_8B_E8T2.folding, 512),
    "the paper's, 128": (spread(128, tp=2, cp=2, pp=4, vpp=8, ep=8).folding, 128),
    "ETP over TP": (spread(64, tp=2, pp=2, ep=4, etp=4).folding, 64),
    "EP over DP and CP": (spread(96, tp=2, cp=3, pp=2, ep=12).folding, 96),
    **{name: (found.folding, found.world_size) for name, found in FOLDINGS.items()},
}


NAMES = {"TP": "tp", "CP": "cp", "DP": "dp", "PP": "pp", "DP·CP": "dp-cp"}


EXPERT_NAMES = {"ETP": "tp", "EP": "ep", "EDP": "dp", "ETP·EP": "tp-ep", "PP": "pp"}


def generators(folding: ParallelFolding, world_size: int) -> tuple[Any, Any]:
    from megatron.core.parallel_state import RankGenerator

    order = "tp-cp-ep-dp-pp"
    pp = folding.pipeline_model_parallel_size
    attention = RankGenerator(
        tp=folding.tensor_model_parallel_size,
        ep=1,
        dp=folding.data_parallel_size(world_size),
        pp=pp,
        cp=folding.context_parallel_size,
        order=order,
    )
    experts = RankGenerator(
        tp=folding.expert_tensor_parallel_size,
        ep=folding.expert_model_parallel_size,
        dp=folding.expert_data_parallel_size(world_size),
        pp=pp,
        cp=1,
        order=order,
    )
    return attention, experts


@pytest.mark.parametrize("name", MAPPINGS)
def test_groups_are_megatrons(name: str) -> None:
    folding, world_size = MAPPINGS[name]
    found = rank_groups(folding, world_size)
    attention, experts = generators(folding, world_size)
    for kinds, generator in ((NAMES, attention), (EXPERT_NAMES, experts)):
        for kind, token in kinds.items():
            expected = {tuple(ranks) for ranks in generator.get_ranks(token)}
            assert set(found[kind].ranks) == expected, kind
    assert found.keys() == KINDS.keys() == PURPOSES.keys()
    assert all(sorted(sum(g.ranks, ())) == list(range(world_size)) for g in found.values())


PAPER = LLAMA3_8B_E8T2.folding


WIDE = ParallelFolding(
    tensor_model_parallel_size=4,
    context_parallel_size=2,
    pipeline_model_parallel_size=4,
    expert_model_parallel_size=8,
    expert_tensor_parallel_size=2,
)


@pytest.mark.parametrize("world_size", [128, 512])
@pytest.mark.parametrize("folding", [PAPER, WIDE, ParallelFolding(expert_tensor_parallel_size=4)])
def test_coordinates_are_megatrons(folding: ParallelFolding, world_size: int) -> None:
    from megatron.core.parallel_state import RankGenerator

    pp, order = folding.pipeline_model_parallel_size, "tp-cp-ep-dp-pp"
    attention = RankGenerator(
        tp=folding.tensor_model_parallel_size,
        cp=folding.context_parallel_size,
        ep=1,
        dp=folding.data_parallel_size(world_size),
        pp=pp,
        order=order,
    )
    experts = RankGenerator(
        tp=folding.expert_tensor_parallel_size,
        cp=1,
        ep=folding.expert_model_parallel_size,
        dp=folding.expert_data_parallel_size(world_size),
        pp=pp,
        order=order,
    )
    places = [coordinates(folding, world_size, rank) for rank in range(world_size)]
    for name, generator, token in (
        ("tp", attention, "tp"),
        ("cp", attention, "cp"),
        ("dp", attention, "dp"),
        ("pp", attention, "pp"),
        ("etp", experts, "tp"),
        ("ep", experts, "ep"),
        ("edp", experts, "dp"),
        ("pp", experts, "pp"),
    ):
        for group in generator.get_ranks(token):
            assert [getattr(places[rank], name) for rank in group] == list(range(len(group)))


STAGES = {
    "even": (32, {"pipeline_model_parallel_size": 4}),
    "virtual": (
        32,
        {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 8},
    ),
    "first": (31, {"pipeline_model_parallel_size": 4, "num_layers_in_first_pipeline_stage": 7}),
    "last": (31, {"pipeline_model_parallel_size": 4, "num_layers_in_last_pipeline_stage": 7}),
    "both": (
        14,
        {
            "pipeline_model_parallel_size": 4,
            "num_layers_in_first_pipeline_stage": 3,
            "num_layers_in_last_pipeline_stage": 1,
        },
    ),
    "both, virtual": (
        24,
        {
            "pipeline_model_parallel_size": 4,
            "virtual_pipeline_model_parallel_size": 2,
            "num_layers_in_first_pipeline_stage": 6,
            "num_layers_in_last_pipeline_stage": 2,
        },
    ),
    "both, no middle": (
        5,
        {
            "pipeline_model_parallel_size": 2,
            "num_layers_in_first_pipeline_stage": 3,
            "num_layers_in_last_pipeline_stage": 2,
        },
    ),
    "first, virtual": (
        20,
        {
            "pipeline_model_parallel_size": 4,
            "virtual_pipeline_model_parallel_size": 2,
            "num_layers_in_first_pipeline_stage": 2,
        },
    ),
    "embedding": (
        31,
        {"pipeline_model_parallel_size": 4, "account_for_embedding_in_pipeline_split": True},
    ),
    "loss": (31, {"pipeline_model_parallel_size": 4, "account_for_loss_in_pipeline_split": True}),
    "embedding and loss, virtual": (
        30,
        {
            "pipeline_model_parallel_size": 4,
            "virtual_pipeline_model_parallel_size": 4,
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
        },
    ),
    "stages of embedding and loss alone": (
        2,
        {
            "pipeline_model_parallel_size": 4,
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
        },
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_layers_are_where_megatron_puts_them(name: str) -> None:
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    num_layers, sizes = STAGES[name]
    folding = ParallelFolding(**sizes)
    config = SimpleNamespace(
        num_layers=num_layers, pipeline_model_parallel_layout=None, **vars(folding)
    )
    virtual = folding.virtual_pipeline_model_parallel_size
    layers = stage_layers(num_layers, folding)
    assert len(layers) == folding.pipeline_model_parallel_size
    for stage, chunks in enumerate(layers):
        assert len(chunks) == (virtual or 1)
        for chunk, found in enumerate(chunks):
            where = {"vp_stage": chunk if virtual else None, "pp_rank": stage}
            first = get_transformer_layer_offset(config, **where)
            count = get_num_layers_to_build(config, **where)
            assert list(found) == list(range(first, first + count))
    assert sorted(layer for chunks in layers for c in chunks for layer in c) == [*range(num_layers)]

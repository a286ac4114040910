"""Every rank's place, layers and shards, on mappings too large to be built here."""

import re
from collections import defaultdict
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
from nemo_upcycle_recipes.numbers import LLAMA3_8B_E8T2

from nemo_upcycle.checkpoint import TensorInfo
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture
from nemo_upcycle.families.llama import LLAMA
from nemo_upcycle.plans.layout import Coordinates, coordinates, shards, validate
from nemo_upcycle.plans.rank import Shard, make_plan
from tests.thorough import thorough
from tests.tiny import CONFIG

ARCH = LLAMA.architecture({**CONFIG, "model_type": "llama"})
MOE = UpcyclingConfig(num_moe_experts=8)
DENSE = UpcyclingConfig(num_moe_experts=None)
LLAMA_8B, PAPER = LLAMA3_8B_E8T2.architecture, LLAMA3_8B_E8T2.folding


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"pipeline_model_parallel_size": 3}, "4 layers do not divide over the pipeline stages"),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 4},
            "stage 0 has 2 of the 4 layers, which do not divide over virtual_pipeline_model_par",
        ),
        (
            {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 4},
            "0 places are left for 1 even stages",
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "num_layers_in_first_pipeline_stage": 1,
                "num_layers_in_last_pipeline_stage": 2,
            },
            "1 places are left for 0 even stages",
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "num_layers_in_first_pipeline_stage": 2,
                "num_layers_in_last_pipeline_stage": 2,
            },
            "supports no virtual stages",
        ),
        ({"tensor_model_parallel_size": 16}, "num_attention_heads=8 does not divide"),
        ({"tensor_model_parallel_size": 8}, "num_query_groups=4 does not divide"),
        ({"expert_tensor_parallel_size": 5}, "ffn_hidden_size=96 does not divide by expert_tensor"),
        ({"expert_model_parallel_size": 16}, "8 experts do not divide"),
    ],
)
def test_what_does_not_divide_is_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UpcyclingError, match=message):
        validate(ARCH, MOE, ParallelFolding(**sizes))


def test_ranks_must_divide_and_exist() -> None:
    with pytest.raises(UpcyclingError, match="8 ranks do not divide"):
        shards(ARCH, MOE, ParallelFolding(context_parallel_size=3), 8, 0)
    with pytest.raises(UpcyclingError, match="no rank 8; expected 0 to 7"):
        shards(ARCH, MOE, ParallelFolding(), 8, 8)


def test_dense_models_have_no_experts_to_spread() -> None:
    validate(ARCH, DENSE, ParallelFolding(expert_tensor_parallel_size=5))
    odd = replace(ARCH, ffn_hidden_size=97)
    validate(odd, MOE, ParallelFolding(tensor_model_parallel_size=2))
    with pytest.raises(UpcyclingError, match="ffn_hidden_size=97 does not divide by tensor_model"):
        validate(odd, DENSE, ParallelFolding(tensor_model_parallel_size=2))
    with pytest.raises(UpcyclingError, match="has no experts"):
        validate(ARCH, DENSE, ParallelFolding(expert_model_parallel_size=2))


# --- Llama 3 8B on the paper's mappings ---------------------------------------------------------

Owned = list[tuple[Coordinates, list[Shard]]]
D, F, V, QKV, E = 4096, 14336, 128256, (32 + 2 * 8) * 128, 8


@cache
def owned_by_all(world_size: int, arch: Architecture = LLAMA_8B) -> Owned:
    return [
        (
            coordinates(PAPER, world_size, rank),
            shards(arch, LLAMA3_8B_E8T2.upcycling, PAPER, world_size, rank),
        )
        for rank in range(world_size)
    ]


@pytest.fixture(scope="module", params=[128, 512])
def owned(request: pytest.FixtureRequest) -> Owned:
    return owned_by_all(request.param)


def parameters() -> dict[str, tuple[tuple[int, ...], str]]:
    """Return each parameter's shape, and by what each replica of it is told from the others."""
    result: dict[str, tuple[tuple[int, ...], str]] = {
        "embedding.word_embeddings.weight": ((V, D), "split"),
        "output_layer.weight": ((V, D), "split"),
        "decoder.final_layernorm.weight": ((D,), "whole"),
    }
    for layer in range(32):
        prefix = f"decoder.layers.{layer}."
        result |= {
            prefix + "self_attention.linear_qkv.layer_norm_weight": ((D,), "whole"),
            prefix + "self_attention.linear_qkv.weight": ((QKV, D), "split"),
            prefix + "self_attention.linear_proj.weight": ((D, D), "split"),
            prefix + "pre_mlp_layernorm.weight": ((D,), "whole"),
            prefix + "mlp.router.weight": ((E, D), "whole"),
        }
        for expert in range(E):
            experts = f"{prefix}mlp.experts.{expert}."
            result[experts + "linear_fc1.weight"] = ((2 * F, D), "expert")
            result[experts + "linear_fc2.weight"] = ((D, F), "expert")
    return result


def replica(place: Coordinates, kind: str) -> tuple[int, ...]:
    attention = (place.dp, place.cp)
    return {"split": attention, "whole": (*attention, place.tp), "expert": (place.edp,)}[kind]


def not_once(shape: tuple[int, ...], rectangles: list[Shard]) -> list[tuple[int, ...]]:
    """Return how often each cell of the grid of all edges is covered, where it is not once."""
    edges = [
        sorted(
            {0, size}
            | {shard.offset[axis] for shard in rectangles}
            | {shard.offset[axis] + shard.shape[axis] for shard in rectangles}
        )
        for axis, size in enumerate(shape)
    ]
    cells = [(low, high) for low, high in pairwise(edges[0])]
    columns = list(pairwise(edges[1])) if len(shape) > 1 else [(0, 1)]
    wrong = []
    for low, high in cells:
        for left, right in columns:
            count = 0
            for shard in rectangles:
                first, last = shard.columns or (0, 1)
                inside = shard.rows[0] <= low and high <= shard.rows[1]
                count += inside and first <= left and right <= last
            if count != 1 or high > shape[0] or (len(shape) > 1 and right > shape[1]):
                wrong.append((low, left, count))
    return wrong


def faults(owned: Owned) -> list[object]:
    """Return what is not covered exactly once in every replica, by exact count of elements."""
    expected = parameters()
    found: dict[tuple[str, tuple[int, ...]], list[Shard]] = defaultdict(list)
    for place, shards_there in owned:
        for shard in shards_there:
            found[shard.name, replica(place, expected[shard.name][1])].append(shard)
    replicas = {
        kind: {replica(place, kind) for place, _ in owned} for kind in ("split", "whole", "expert")
    }
    wanted = {(name, which) for name, (_, kind) in expected.items() for which in replicas[kind]}
    problems: list[object] = sorted(wanted ^ set(found))
    seen: dict[tuple[str, tuple[Shard, ...]], list[tuple[int, ...]]] = {}
    for (name, which), rectangles in found.items():
        shape = expected[name][0]
        if any(shard.global_shape != shape for shard in rectangles):
            problems.append((name, "shape"))
        key = name, tuple(sorted(rectangles, key=lambda shard: shard.offset))
        if key not in seen:
            seen[key] = not_once(shape, rectangles)
        problems += [(name, which, cell) for cell in seen[key]]
    return problems


def test_every_replica_has_every_element_once(owned: Owned) -> None:
    assert not faults(owned)


@pytest.mark.parametrize("fault", ["drop", "double", "shift", "shrink"])
@pytest.mark.parametrize("rank", [0, thorough(127)])
def test_the_count_finds_every_fault(rank: int, fault: str) -> None:
    """A count that could not fail would prove nothing."""
    owned = list(owned_by_all(128))
    found = owned[rank][1]
    kinds = {re.sub(r"\d+", "", shard.name): index for index, shard in enumerate(found)}
    for index in kinds.values():
        damaged = list(found)
        shard = damaged.pop(index)
        if fault == "double":
            damaged += [shard, shard]
        elif fault == "shift":
            damaged.append(replace(shard, offset=(shard.offset[0] + 1, *shard.offset[1:])))
        elif fault == "shrink":
            damaged.append(replace(shard, shape=(shard.shape[0] - 1, *shard.shape[1:])))
        owned[rank] = owned[rank][0], damaged
        assert faults(owned), shard


def test_all_ranks_together_read_every_dense_tensor_whole(owned: Owned) -> None:
    tensors = {name: TensorInfo(shape, "BF16") for name, shape in LLAMA.shapes(LLAMA_8B).items()}
    blocks: dict[str, set[Shard]] = defaultdict(set)
    plans: set[tuple[int, ...]] = set()
    for place, shards_there in owned:
        if place.owner in plans:
            continue
        plans.add(place.owner)
        plan = make_plan(shards_there, tensors, LLAMA, LLAMA_8B, LLAMA3_8B_E8T2.upcycling)
        for block in plan.copies:
            shape = tensors[block.tensor].shape
            rows, columns = block.rows, block.columns or (0, 1)
            offset = (rows[0], columns[0])[: len(shape)]
            size = (rows[1] - rows[0], columns[1] - columns[0])[: len(shape)]
            blocks[block.tensor].add(Shard(block.tensor, shape, offset, size))
    assert set(blocks) == set(tensors)
    unread = {
        name: cells
        for name, found in blocks.items()
        if (cells := [c for c in not_once(tensors[name].shape, list(found)) if c[2] == 0])
    }
    assert not unread

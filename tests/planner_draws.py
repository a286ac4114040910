"""Random models, numbers of GPUs, hardware and settings for the planner, each by its seed."""

from dataclasses import dataclass, replace
from random import Random
from typing import Any

from nemo_upcycle.checkpoint.described import Dense, dense_of_config
from nemo_upcycle.planner.hardware import Hardware, hardware, shipped
from tests.tiny import CONFIG, FAMILIES

GPUS = (1, 2, 3, 4, 6, 7, 8, 12, 13, 16, 20, 24, 32, 64, 96, 128)
MANY = (512, 1000, 4096)


@dataclass(frozen=True)
class Draw:
    """A question to the planner.

    Attributes:
        dense: The dense model.
        gpus: Number of GPUs.
        kind: The hardware.
        values: Arguments of the recipe `upcycle`.
    """

    dense: Dense
    gpus: int
    kind: Hardware
    values: dict[str, Any]


def draw(seed: int) -> Draw:
    """Return the question of a seed."""
    random = Random(seed)
    return Draw(
        _dense(random),
        random.choice(GPUS if random.random() < 0.9 else MANY),
        _hardware(random),
        _values(random),
    )


def _dense(random: Random) -> Dense:
    family = random.choice(list(FAMILIES))
    groups = random.choice((1, 2, 4, 8))
    heads = groups * random.choice((1, 2, 3, 4, 7))
    hidden = heads * random.choice((64, 128))
    sizes = {
        "num_hidden_layers": random.choice((1, 2, 3, 4, 5, 6, 8, 12, 13, 16)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "hidden_size": hidden,
        "intermediate_size": random.choice((hidden, 7 * hidden // 2, 4 * hidden, 8 * hidden)),
        "vocab_size": random.choice((1000, 32_000, 151_936)),
        "max_position_embeddings": random.choice((2048, 8192, 32_768)),
        "tie_word_embeddings": random.random() < 0.3,
    }
    kind = family.partition(",")[0]
    config = CONFIG | FAMILIES[family] | sizes | {"model_type": kind}
    return dense_of_config(config, "drawn", "")


def _hardware(random: Random) -> Hardware:
    kind = hardware(random.choice(shipped()))
    per_node = random.choice((1, 2, 4, 6, 8, 8, kind.gpus_per_node))
    return replace(
        kind,
        gpus_per_node=per_node,
        nvlink_domain=random.choice((1, per_node, per_node, 9 * per_node)),
        memory_gib=kind.memory_gib * random.choice((0.1, 0.2, 0.5, 1, 1)),
        nvlink_bandwidth=kind.nvlink_bandwidth * random.choice((0.1, 0.5, 1, 2)),
        network_bandwidth=kind.network_bandwidth * random.choice((0.01, 0.3, 1, 4)),
    )


def _values(random: Random) -> dict[str, Any]:
    every: dict[str, list[Any]] = {
        "num_moe_experts": [None, 2, 4, 6, 8, 8],
        "global_batch_size": [1, 8, 96, 480, 512, 1000],
        "seq_length": [512, 2048, 3000, 16_384],
        "micro_batch_size": [1, 2, 3, 8],
        "recompute": ["none", "full"],
        "tensor_model_parallel_size": [1, 2, 3, 16],
        "context_parallel_size": [1, 2, 3, 16],
        "pipeline_model_parallel_size": [1, 2, 3, 5],
        "virtual_pipeline_model_parallel_size": [None, 2, 3],
        "expert_model_parallel_size": [1, 2, 3, 8],
        "account_for_loss_in_pipeline_split": [True],
        "num_layers_in_last_pipeline_stage": [1, 2],
        "num_nodes": [1, 2, 3],
        "num_gpus_per_node": [1, 4, 6],
    }
    chance = {"num_moe_experts": 0.7, "global_batch_size": 0.3, "seq_length": 0.3}
    return {
        name: random.choice(values)
        for name, values in every.items()
        if random.random() < chance.get(name, 0.07)
    }

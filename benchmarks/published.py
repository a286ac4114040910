"""Published training speeds, for calibrating and validating the planner."""

from dataclasses import dataclass, replace

from nemo_upcycle_recipes.numbers import LLAMA3_8B_E8T2, LLAMA31_70B_E8T2

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.planner.search import Allowed, unfolded
from nemo_upcycle.planner.workload import Mapping, Workload

LLAMA3_8B = LLAMA3_8B_E8T2.architecture
LLAMA3_70B = LLAMA31_70B_E8T2.architecture  # 3 and 3.1 differ only in RoPE scaling
MIXTRAL_22B = replace(
    LLAMA3_8B,
    num_layers=56,
    hidden_size=6144,
    ffn_hidden_size=16384,
    num_attention_heads=48,
    vocab_size=32768,
)


@dataclass(frozen=True)
class Published:
    """A published training speed on H100.

    Attributes:
        source: arXiv id.
        label: The paper's name of the run.
        workload: Model and training settings.
        world_size: Number of GPUs.
        allowed: Mappings that the paper leaves open; the fastest is compared, because the papers
            tuned theirs.
        mfu: Model-FLOPs utilisation, with attention counted over the full square; None if the run
            did not fit into memory.
    """

    source: str
    label: str
    workload: Workload
    world_size: int
    allowed: Allowed
    mfu: float | None


def _sizes(**said: int) -> Allowed:
    """Allow the mappings with these sizes, given by the papers' abbreviations."""

    def allowed(mapping: Mapping) -> bool:
        return not mapping.fsdp and all(
            (getattr(mapping.folding, ParallelFolding.NAMES[name]) or 1) == size
            for name, size in said.items()
        )

    return allowed


def _e8t2(capacity_factor: float | None) -> UpcyclingConfig:
    return UpcyclingConfig(moe_expert_capacity_factor=capacity_factor)


def _llama3_8b(capacity_factor: float | None, tp: int, mfu: float) -> Published:
    """Return a row of Table 2; the unstated batch size is assumed to be 512, as in our recipe."""
    called = "dropless" if capacity_factor is None else f"CF {capacity_factor:g}"
    return Published(
        "2412.09952",
        f"Llama 3 8B E8T2, {called}, TP{tp}",
        Workload(LLAMA3_8B, _e8t2(capacity_factor), 8192, 512),
        128,
        lambda mapping: (
            mapping.micro_batch_size == 1 and _sizes(tp=tp, cp=2, etp=1, ep=8, pp=4, vpp=8)(mapping)
        ),
        mfu,
    )


def _without_pipeline(mapping: Mapping) -> bool:
    no_context = mapping.folding.context_parallel_size == 1
    no_pipeline = mapping.folding.pipeline_model_parallel_size == 1
    return not mapping.fsdp and no_context and no_pipeline and unfolded(mapping)


def _fsdp(ep: int) -> Allowed:
    return lambda mapping: (
        mapping.fsdp
        and mapping.micro_batch_size == 1
        and mapping.folding.expert_model_parallel_size == ep
    )


MIXTRAL_8X22B = Workload(MIXTRAL_22B, _e8t2(1.0), 4096, 256)
LLAMA3_8X70B = Workload(LLAMA3_70B, _e8t2(1.0), 4096, 256)


def _folding_paper(
    name: str, workload: Workload, world_size: int, rows: dict[str, tuple]
) -> list[Published]:
    return [
        Published("2504.14960", f"{name}, {label}", workload, world_size, allowed, mfu)
        for label, (allowed, mfu) in rows.items()
    ]


RUNS = [
    _llama3_8b(1.0, 1, 0.468),
    _llama3_8b(2.0, 2, 0.392),
    _llama3_8b(4.0, 2, 0.394),
    _llama3_8b(None, 2, 0.396),
    *_folding_paper(
        "Mixtral 8x22B",
        MIXTRAL_8X22B,
        128,
        {
            "FSDP": (_fsdp(1), 0.043),
            "FSDP + EP": (_fsdp(8), 0.234),
            "TP + EP + DP": (_without_pipeline, 0.366),
            "Megatron-Core": (_sizes(tp=2, ep=4, pp=8, etp=2, cp=1), 0.463),
            "folding": (_sizes(tp=2, ep=8, pp=8, etp=1, cp=1), 0.493),
        },
    ),
    *_folding_paper(
        "Llama3-8x70B",
        LLAMA3_8X70B,
        256,
        {
            "FSDP": (_fsdp(1), None),
            "FSDP + EP": (_fsdp(8), 0.196),
            "TP + EP + DP": (_without_pipeline, None),
            "Megatron-Core": (_sizes(tp=8, ep=4, pp=8, etp=8, cp=1), 0.388),
            "folding": (_sizes(tp=8, ep=8, pp=16, etp=1, cp=1), 0.416),
        },
    ),
]
"""arXiv 2412.09952 Table 2, arXiv 2504.14960 §4.2 (capacity factor 1, sequence 4096, batch 256)."""

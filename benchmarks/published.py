"""Published training speeds and memory, for calibrating and validating the planner.

A run has one role. *Calibrated*: `benchmarks/planner.py` fits the planner's efficiencies to the
run. *Left out*: the planner never sees the run before its prediction is compared.
"""

from dataclasses import dataclass, replace
from typing import Any

from nemo_upcycle_recipes.numbers import LLAMA3_8B_E8T2, LLAMA31_70B_E8T2

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.config.folding import ACCOUNTED_LAYERS
from nemo_upcycle.families import Architecture
from nemo_upcycle.planner.hardware import hardware
from nemo_upcycle.planner.search import Allowed, unfolded
from nemo_upcycle.planner.workload import Mapping, Workload

LLAMA3_8B = LLAMA3_8B_E8T2.architecture
LLAMA3_70B = LLAMA31_70B_E8T2.architecture  # 3 and 3.1 differ only in RoPE scaling
MIXTRAL_7B = replace(LLAMA3_8B, vocab_size=32000)
MIXTRAL_22B = replace(
    LLAMA3_8B,
    num_layers=56,
    hidden_size=6144,
    ffn_hidden_size=16384,
    num_attention_heads=48,
    vocab_size=32768,
)
# 94 layers: the embedding and the loss take the place of a layer each.
QWEN3_235B = replace(
    LLAMA3_8B,
    num_layers=94,
    hidden_size=4096,
    ffn_hidden_size=12288,
    num_attention_heads=64,
    num_query_groups=4,
    kv_channels=128,
    vocab_size=151936,
)

CALIBRATED, LEFT_OUT = "calibrated", "left out"


@dataclass(frozen=True)
class Published:
    """A published run.

    Attributes:
        source: arXiv id, or the repository that states the run.
        label: The run.
        experts: `coarse`, as wide as the dense layer, or `narrow`.
        role: `calibrated` or `left out`.
        workload: Model and training settings.
        world_size: Number of GPUs.
        mapping: The mapping; or which mappings the source leaves open, of which the fastest that
            fits is compared, because the sources tuned theirs.
        seconds: Time of a step; None if the run did not fit into memory.
        even: The router was forced to spread tokens evenly.
        hardware: The GPUs.
        peak_gib: Peak of PyTorch's allocated memory, where published.
    """

    source: str
    label: str
    experts: str
    role: str
    workload: Workload
    world_size: int
    mapping: Mapping | Allowed
    seconds: float | None
    even: bool = False
    hardware: str = "h100"
    peak_gib: float | None = None


def _workload(
    arch: Architecture, seq_length: int, batch: int, capacity: float | None = None, **experts: Any
) -> Workload:
    upcycling = UpcyclingConfig(moe_expert_capacity_factor=capacity, **experts)
    return Workload(arch, upcycling, seq_length, batch)


def _seconds(work: Workload, gpus: int, tflops: float, *, full: bool = False) -> float:
    """Return a step's time by TFLOP/s per GPU.

    Args:
        work: Model and batch.
        gpus: Number of GPUs.
        tflops: TFLOP/s per GPU.
        full: Attention is counted over the full square; if not, over its causal half.
    """
    counted = work.flops.training_full_attention if full else work.flops.training
    return counted * work.global_batch_size / (tflops * 1e12 * gpus)


PEAK = hardware("h100").peak_tflops


def _llama3_8b(capacity: float | None, tp: int, mfu: float) -> Published:
    """Return a row of Table 2; the unstated batch size is assumed to be 512, as in our recipe."""
    called = "dropless" if capacity is None else f"CF {capacity:g}"
    work = _workload(LLAMA3_8B, 8192, 512, capacity)
    mapping = Mapping(ParallelFolding.of(tp=tp, cp=2, pp=4, vpp=8, ep=8), 128)
    seconds = _seconds(work, 128, mfu * PEAK, full=True)
    label = f"Llama 3 8B E8T2, {called}, TP{tp}"
    return Published("2412.09952", label, "coarse", CALIBRATED, work, 128, mapping, seconds)


PAPER = [
    _llama3_8b(1.0, 1, 0.468),
    _llama3_8b(2.0, 2, 0.392),
    _llama3_8b(4.0, 2, 0.394),
    _llama3_8b(None, 2, 0.396),
]
"""arXiv 2412.09952 Table 2."""


def _without_pipeline(mapping: Mapping) -> bool:
    no_context = mapping.folding.context_parallel_size == 1
    no_pipeline = mapping.folding.pipeline_model_parallel_size == 1
    return no_context and no_pipeline and unfolded(mapping)


def _sizes(**said: int) -> Allowed:
    """Allow the mappings with these sizes, given by the papers' abbreviations."""
    return lambda mapping: all(
        (getattr(mapping.folding, ParallelFolding.NAMES[name]) or 1) == size
        for name, size in said.items()
    )


def _folding_paper(
    name: str,
    arch: Architecture,
    gpus: int,
    batch: int,
    rows: dict[str, tuple[Allowed, float | None]],
) -> list[Published]:
    """Return runs of arXiv 2504.14960: capacity factor 1, sequence 4,096."""
    work = _workload(arch, 4096, batch, 1.0, moe_pad_expert_input_to_capacity=True)
    return [
        Published(
            "2504.14960",
            f"{name}, {label}",
            "coarse",
            CALIBRATED,
            work,
            gpus,
            allowed,
            None if mfu is None else _seconds(work, gpus, mfu * PEAK, full=True),
        )
        for label, (allowed, mfu) in rows.items()
    ]


_22B = _sizes(tp=2, ep=4, pp=8, etp=2, cp=1)
_8X70B = _sizes(tp=8, ep=4, pp=8, etp=8, cp=1)

FOLDING = [
    *_folding_paper(
        "Mixtral 8x22B",
        MIXTRAL_22B,
        128,
        256,
        {
            "TP + EP + DP": (_without_pipeline, 0.366),
            "Megatron-Core": (_22B, 0.463),
            "folding": (_sizes(tp=2, ep=8, pp=8, etp=1, cp=1), 0.493),
        },
    ),
    *_folding_paper(
        "Llama3-8x70B",
        LLAMA3_70B,
        256,
        256,
        {
            "TP + EP + DP": (_without_pipeline, None),
            "Megatron-Core": (_8X70B, 0.388),
            "folding": (_sizes(tp=8, ep=8, pp=16, etp=1, cp=1), 0.416),
        },
    ),
]
"""arXiv 2504.14960 §4.2."""

STRONG_SCALING = [
    run
    for name, arch, allowed, rows in (
        ("Mixtral 8x22B", MIXTRAL_22B, _22B, {128: 0.494, 256: 0.480, 512: 0.455, 1024: 0.423}),
        ("Llama3-8x70B", LLAMA3_70B, _8X70B, {256: 0.401, 512: 0.395, 1024: 0.391}),
    )
    for gpus, mfu in rows.items()
    for run in _folding_paper(name, arch, gpus, 1024, {f"batch 1024, {gpus} GPUs": (allowed, mfu)})
]
"""arXiv 2504.14960 Table 4."""


def _mixtral(
    label: str,
    work: Workload,
    mapping: Mapping,
    tflops: float,
    *,
    source: str = "Megatron-MoE-ModelZoo",
    full: bool = False,
    even: bool = False,
    role: str = CALIBRATED,
) -> Published:
    gpus = mapping.world_size
    seconds = _seconds(work, gpus, tflops, full=full)
    return Published(source, label, "coarse", role, work, gpus, mapping, seconds, even)


_ZOO = Mapping(ParallelFolding.of(tp=2, pp=8, vpp=7, ep=8), 128)
_DROPLESS_22B = _workload(MIXTRAL_22B, 4096, 256)
_PADDED_22B = _workload(MIXTRAL_22B, 4096, 256, 1.0, moe_pad_expert_input_to_capacity=True)

MIXTRAL = [
    _mixtral(
        "Mixtral 8x7B, dropless",
        _workload(MIXTRAL_7B, 4096, 256),
        Mapping(ParallelFolding.of(pp=4, vpp=8, ep=8), 64),
        468,
        source="Megatron-LM",
        full=True,
    ),
    _mixtral("Mixtral 8x22B, dropless", _DROPLESS_22B, _ZOO, 445),
    _mixtral("Mixtral 8x22B, dropless, forced balance", _DROPLESS_22B, _ZOO, 465, even=True),
    _mixtral("Mixtral 8x22B, CF 1", _PADDED_22B, _ZOO, 470),
    _mixtral(
        "Mixtral 8x22B, FP8, forced balance",
        replace(_DROPLESS_22B, precision="fp8"),
        _ZOO,
        560,
        even=True,
        role=LEFT_OUT,
    ),
]
"""Megatron-LM megatron/core/transformer/moe/README.md (Megatron-Core 0.9), attention counted in
full; yanring/Megatron-MoE-ModelZoo best_practice/mixtral, counted causally."""


def _qwen3(
    label: str,
    gpus: int,
    seconds: float | None,
    *,
    role: str = CALIBRATED,
    dispatcher: str = "flex",
    recompute: str = "norm_act",
    seq_length: int = 4096,
    batch: int = 2048,
    tflops: float | None = None,
    even: bool = False,
    **sizes: int,
) -> Published:
    work = _workload(
        QWEN3_235B,
        seq_length,
        batch,
        num_moe_experts=128,
        granularity=8,
        moe_router_topk=8,
        moe_token_dispatcher_type=dispatcher,
    )
    accounted = dict.fromkeys(ACCOUNTED_LAYERS, True)
    folding = ParallelFolding.of(**sizes, **accounted)
    mapping = Mapping(folding, gpus, recompute=recompute)
    if tflops is not None:
        seconds = _seconds(work, gpus, tflops)
    label = f"Qwen3-235B-A22B, {label}"
    return Published(
        "Megatron-MoE-ModelZoo", label, "narrow", role, work, gpus, mapping, seconds, even
    )


QWEN3 = [
    _qwen3("DeepEP over nodes", 256, 19.7, even=True, tp=2, pp=8, vpp=4, ep=32),
    _qwen3(
        "all-to-all in a node",
        256,
        24.2,
        even=True,
        dispatcher="alltoall",
        tp=2,
        pp=32,
        vpp=3,
        ep=8,
    ),
    _qwen3(
        "DeepEP in a node, TP4", 256, 29.0, even=True, recompute="none", tp=4, pp=8, vpp=4, ep=8
    ),
    *(
        _qwen3(
            f"{length // 1024}k tokens, {'forced balance' if even else 'dropless'}",
            256,
            None,
            role=LEFT_OUT,
            recompute="moe",
            seq_length=length,
            batch=256,
            tflops=tflops,
            even=even,
            tp=4,
            cp=cp,
            pp=8,
            vpp=4,
            ep=8,
        )
        for length, cp, balanced, real in (
            (16384, 1, 295, 237),
            (32768, 2, 335, 277),
            (65536, 4, 368, 320),
            (131072, 8, 389, 357),
        )
        for even, tflops in ((True, balanced), (False, real))
    ),
]
"""yanring/Megatron-MoE-ModelZoo best_practice/qwen3. The first three do not say how tokens were
routed; forced balance, as the source recommends for benchmarks, is assumed."""


def _megatron_test(
    case: str,
    arch: Architecture,
    batch: int,
    mapping: Mapping,
    seconds: float,
    peak_gib: float,
    hardware: str = "h100",
) -> Published:
    work = _workload(arch, 4096, batch)
    label = case if hardware == "h100" else f"{case}, {hardware.upper()}"
    gpus = mapping.world_size
    return Published(
        "Megatron-LM tests",
        label,
        "coarse",
        LEFT_OUT,
        work,
        gpus,
        mapping,
        seconds,
        hardware=hardware,
        peak_gib=peak_gib,
    )


_WIDE_VOCABULARY = replace(MIXTRAL_7B, vocab_size=256000)
_TP2_PP4_EP4 = Mapping(ParallelFolding.of(tp=2, pp=4, ep=4, etp=2), 128)

MEGATRON_TESTS = [
    _megatron_test(
        "mixtral_8x7b_tp1pp4ep8vpp8",
        MIXTRAL_7B,
        256,
        Mapping(ParallelFolding.of(tp=2, pp=4, vpp=8, ep=8), 64),
        3.31,
        33.07,
    ),
    _megatron_test(
        "mixtral_8x22b_tp2pp8ep8vpp1",
        replace(MIXTRAL_22B, vocab_size=32000),
        256,
        Mapping(ParallelFolding.of(tp=2, pp=8, ep=8, etp=2), 128),
        6.98,
        26.57,
    ),
    _megatron_test(
        "mixtral_8x7b_alltoall_tp2pp4ep4", _WIDE_VOCABULARY, 1024, _TP2_PP4_EP4, 8.96, 24.68
    ),
    _megatron_test(
        "mixtral_8x7b_alltoall_tp2pp4ep4",
        _WIDE_VOCABULARY,
        1024,
        _TP2_PP4_EP4,
        22.23,
        24.92,
        "a100",
    ),
]
"""Golden values of Megatron-LM's functional tests at d98e8a64; the number of GPUs is inferred: only
one fits the memory."""

_TWO_LAYERS = replace(LLAMA3_8B, num_layers=2, vocab_size=32000)

MEASURED = [
    Published(
        "measured",
        f"two layers of Llama 3 8B E8T2, {called}",
        "coarse",
        LEFT_OUT,
        _workload(_TWO_LAYERS, 8192, 8, capacity),
        1,
        Mapping(ParallelFolding(), 1),
        seconds,
        peak_gib=peak,
    )
    for called, capacity, seconds, peak in (
        ("CF 1", 1.0, 0.787, 59.5),
        ("dropless", None, 0.804, None),
    )
]
"""One H100 with this project's recipes, eight microbatches per step."""

RUNS = [
    *PAPER,
    *FOLDING,
    *STRONG_SCALING,
    *MIXTRAL,
    *QWEN3,
    *MEGATRON_TESTS,
    *MEASURED,
]

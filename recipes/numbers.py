"""The numbers of each recipe.

The NeMo-Run factories, the plan, the planner and the command line read the numbers from here, so
that no number is written twice and only the factories import NeMo.
"""

from dataclasses import replace

from nemo_upcycle_recipes.recipe import Recipe, Schedule

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError

# Chosen where the papers give no number; the same for all sizes.
_PAPER = Schedule(
    # Chosen: the length for which arXiv 2412.09952 counts FLOPs, and Llama 3's own.
    seq_length=8192,
    # Chosen: 4.2M tokens; arXiv 2410.07524 finds 4M better than 2M and 32M.
    global_batch_size=512,
    micro_batch_size=1,
    # Stated: 100B tokens, which are 23,842 steps.
    train_tokens=100_000_000_000,
    # Stated: 3e-5 → 3e-7, cosine, 100 warm-up steps.
    lr=3e-5,
    min_lr=3e-7,
    warmup_steps=100,
    val_check_interval=500,
    checkpoint_interval=500,
)

LLAMA3_8B_E8T2 = Recipe(
    name="llama3_8b_e8t2",
    title="Upcycle Llama 3 8B into 8 experts, top-2, and train on 100B tokens: arXiv 2412.09952.",
    dense="llama3_8b",
    # Stated by arXiv 2412.09952: 8 experts, top-2, Mixtral-type router, capacity factor 4.
    upcycling=UpcyclingConfig(
        num_moe_experts=8,
        moe_router_topk=2,
        moe_router_pre_softmax=False,
        moe_expert_capacity_factor=4.0,
    ),
    # Stated: TP2 EP8 PP4 VPP8, expert-TP 1. CP 2 is from Table 2: all rows with TP2 have CP 2.
    folding=ParallelFolding.of(tp=2, cp=2, pp=4, vpp=8, ep=8, etp=1),
    schedule=_PAPER,
    # Stated: 512 H100.
    num_nodes=64,
    num_gpus_per_node=8,
    # Stated for the early steps, when routing is uneven.
    recompute="moe",
    checkpoint="meta-llama/Meta-Llama-3-8B",
)

LLAMA3_8B_DENSE = replace(
    LLAMA3_8B_E8T2,
    name="llama3_8b_dense",
    title="Train Llama 3 8B on the tokens of `llama3_8b_e8t2`, in the same order, as a control.",
    upcycling=UpcyclingConfig(num_moe_experts=None),
    # Chosen: the MoE's mapping; without experts there is no EP.
    folding=replace(LLAMA3_8B_E8T2.folding, expert_model_parallel_size=1),
    recompute="none",
)
"""The control: the dense model, trained further on the same tokens in the same order."""


def _sibling(
    dense: str, model: str, checkpoint: str, num_nodes: int, folding: ParallelFolding
) -> Recipe:
    """Return the paper's recipe for another dense model, with other GPUs and another mapping."""
    return replace(
        LLAMA3_8B_E8T2,
        name=f"{dense}_e8t2",
        title=f"Upcycle {model} into 8 experts, top-2, and train on 100B tokens.",
        dense=dense,
        checkpoint=checkpoint,
        num_nodes=num_nodes,
        folding=folding,
    )


# Chosen with `nemo-upcycle tune`: the simplest of the fastest mappings. Once routing is even, all
# fit with no recompute, or with recompute of the experts' activation function only.
LLAMA32_1B_E8T2 = _sibling(
    "llama32_1b",
    "Llama 3.2 1B",
    "meta-llama/Llama-3.2-1B",
    num_nodes=1,
    folding=ParallelFolding.of(ep=2),
)
LLAMA32_3B_E8T2 = _sibling(
    "llama32_3b",
    "Llama 3.2 3B",
    "meta-llama/Llama-3.2-3B",
    num_nodes=2,
    folding=ParallelFolding.of(ep=8),
)
MISTRAL_7B_E8T2 = _sibling(
    "mistral_7b",
    "Mistral 7B v0.3",
    "mistralai/Mistral-7B-v0.3",
    num_nodes=16,
    folding=ParallelFolding.of(cp=2, pp=4, vpp=8, ep=4),
)
QWEN25_7B_E8T2 = _sibling(
    "qwen25_7b",
    "Qwen2.5 7B",
    "Qwen/Qwen2.5-7B",
    num_nodes=16,
    folding=ParallelFolding.of(cp=2, pp=4, vpp=7, ep=4),
)
LLAMA31_70B_E8T2 = _sibling(
    "llama31_70b",
    "Llama 3.1 70B",
    "meta-llama/Llama-3.1-70B",
    num_nodes=64,
    folding=ParallelFolding.of(tp=4, cp=2, pp=16, vpp=5, ep=8),
)

# The paper's method on one GPU, in about half an hour. No paper states these numbers; the rules are
# those of `scaled.py`, for 135M instead of 8.03B parameters.
_SMOLLM2_SCHEDULE = Schedule(
    # Chosen: a quarter of the model's context, which was pre-trained with this length.
    seq_length=2048,
    # Chosen: 131k tokens, for 763 steps. The rule of `scaled.py` gives 543k tokens for 1.7B tokens
    # of training; its square root of the tokens gives 132k for 100M.
    global_batch_size=64,
    # Chosen with the planner: the fastest without recompute that fits 80 GB. The host's launches
    # are most of a step, so that larger microbatches are faster: 32 on an H200.
    micro_batch_size=16,
    # Chosen: the text that any machine with this environment has (`nemo-upcycle data sample
    # --packages`), about once.
    train_tokens=100_000_000,
    # The rule of `scaled.py`: the paper's 3e-5 → 3e-7, inverse to the width, · 4,096 / 576.
    lr=2.1e-4,
    min_lr=2.1e-6,
    # The same rule: the paper's 100, at most a tenth of the steps.
    warmup_steps=76,
    val_check_interval=100,
    checkpoint_interval=100,
)

SMOLLM2_135M_E8T2 = Recipe(
    name="smollm2_135m_e8t2",
    title="Upcycle SmolLM2-135M into 8 experts, top-2, and train on 100M tokens on one GPU.",
    dense="smollm2_135m",
    # Stated by arXiv 2412.09952: 8 experts, top-2, Mixtral-type router. Chosen: no token is
    # dropped, as in the paper's capacity factor 4.
    upcycling=UpcyclingConfig(num_moe_experts=8, moe_router_topk=2),
    folding=ParallelFolding(),
    schedule=_SMOLLM2_SCHEDULE,
    checkpoint="HuggingFaceTB/SmolLM2-135M",
)

SMOLLM2_135M_DENSE = replace(
    SMOLLM2_135M_E8T2,
    name="smollm2_135m_dense",
    title="Train SmolLM2-135M on the tokens of `smollm2_135m_e8t2`, as a control.",
    upcycling=UpcyclingConfig(num_moe_experts=None),
)
"""The control: the dense model, trained further on the same tokens in the same order."""

# arXiv 2410.07524, §4. The dense model is Nemotron-4 15B of arXiv 2402.16819. Layers, widths,
# heads, sequence and vocabulary are in its Table 1, squared ReLU and untied embeddings in its §2.
# The feed-forward width, 4 · 6,144, follows from its 12.5B parameters without embeddings. Chosen
# as in NeMo's config of the model: half of each head rotated, RoPE base, norm, initialization.
_NEMOTRON4_SCHEDULE = Schedule(
    # Stated by arXiv 2402.16819: the length that Nemotron-4 15B was pre-trained with.
    seq_length=4096,
    # Stated for the smaller model of the ablations: 4M tokens. For 15B the paper states only that
    # E8G8T8 had a larger batch than E8G1T2.
    global_batch_size=1024,
    micro_batch_size=1,
    # Stated: 1T tokens, which are 238,419 steps.
    train_tokens=1_000_000_000_000,
    # Stated: the learning rate is reset to a peak of 3e-4.
    lr=3e-4,
    # Stated: cosine, down to 1/100 of the minimum of pre-training, printed as 4.5e-4. That minimum
    # is above the peak, so the paper may mean another; taken here as printed.
    min_lr=4.5e-6,
    # Chosen: arXiv 2412.09952's. The paper starts at pre-training's minimum instead of 0.
    warmup_steps=100,
    val_check_interval=500,
    checkpoint_interval=500,
)

NEMOTRON4_15B_E8G1T2 = Recipe(
    name="nemotron4_15b_e8g1t2",
    title="Upcycle Nemotron-4 15B into 8 experts, top-2, on 1T tokens: arXiv 2410.07524.",
    dense="nemotron4_15b",
    upcycling=UpcyclingConfig(
        # Stated: E8G1T2, softmax before top-k, weight scaling, auxiliary loss 1e-2, no z-loss.
        num_moe_experts=8,
        moe_router_topk=2,
        moe_router_pre_softmax=True,
        weight_scaling="paper",
        moe_aux_loss_coeff=1e-2,
        moe_z_loss_coeff=None,
        # Chosen: no token is dropped; the paper does not mention a capacity.
        moe_expert_capacity_factor=None,
    ),
    # Chosen with `nemo-upcycle tune`; the paper states neither GPUs nor mapping.
    folding=ParallelFolding.of(tp=2, pp=2, vpp=16, ep=8),
    schedule=_NEMOTRON4_SCHEDULE,
    num_nodes=64,
    num_gpus_per_node=8,
    # Chosen: for the early steps, when routing is uneven.
    recompute="moe",
    # A directory of your own: the weights are not on the hub.
    checkpoint="Nemotron-4-15B",
)

NEMOTRON4_15B_E8G8T8 = replace(
    NEMOTRON4_15B_E8G1T2,
    name="nemotron4_15b_e8g8t8",
    title="Upcycle Nemotron-4 15B into 64 experts in virtual groups, top-8, on 1T tokens: "
    "arXiv 2410.07524.",
    # Stated: E8G8T8 with virtual groups; the rest as E8G1T2.
    upcycling=replace(
        NEMOTRON4_15B_E8G1T2.upcycling, num_moe_experts=64, granularity=8, moe_router_topk=8
    ),
)

NEMOTRON4_15B_DENSE = replace(
    NEMOTRON4_15B_E8G1T2,
    name="nemotron4_15b_dense",
    title="Train Nemotron-4 15B on the tokens of `nemotron4_15b_e8g1t2`, as a control.",
    upcycling=UpcyclingConfig(num_moe_experts=None),
    # Chosen: the MoE's schedule. The paper's own control began at the minimum of pre-training's
    # learning rate. The mapping is chosen with `nemo-upcycle tune`.
    folding=ParallelFolding.of(tp=2),
    recompute="none",
)
"""The control: the dense model, trained further on the same tokens in the same order."""

# Chosen so that the model learns within minutes on two cores.
_TINY = Schedule(
    seq_length=256,
    global_batch_size=16,
    micro_batch_size=4,
    train_tokens=250 * 16 * 256,
    lr=3e-3,
    min_lr=3e-4,
    warmup_steps=20,
    val_check_interval=50,
    checkpoint_interval=50,
    moe_health_interval=10,
)

LLAMA_TINY = Recipe(
    name="llama_tiny",
    dense="llama_tiny",
    upcycling=UpcyclingConfig(num_moe_experts=None),
    folding=ParallelFolding(),
    schedule=_TINY,
    precision="32",
)

LLAMA_TINY_E8T2 = Recipe(
    name="llama_tiny_e8t2",
    dense="llama_tiny",
    upcycling=UpcyclingConfig(num_moe_experts=8, moe_router_topk=2),
    folding=ParallelFolding(),
    schedule=replace(_TINY, train_tokens=100 * 16 * 256),
    precision="32",
)

FULL_SIZE = (
    LLAMA3_8B_E8T2,
    LLAMA3_8B_DENSE,
    LLAMA32_1B_E8T2,
    LLAMA32_3B_E8T2,
    MISTRAL_7B_E8T2,
    QWEN25_7B_E8T2,
    LLAMA31_70B_E8T2,
    SMOLLM2_135M_E8T2,
    SMOLLM2_135M_DENSE,
    NEMOTRON4_15B_E8G1T2,
    NEMOTRON4_15B_E8G8T8,
    NEMOTRON4_15B_DENSE,
)
"""The recipes whose factories `upcycled.py` makes."""

RECIPES = {recipe.name: recipe for recipe in (*FULL_SIZE, LLAMA_TINY, LLAMA_TINY_E8T2)}
"""All recipes, by the name for `--factory`."""


def recipe_named(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        UpcyclingError: There is no such recipe.
    """
    if name not in RECIPES:
        raise UpcyclingError(f"There is no recipe {name!r}; expected one of: {', '.join(RECIPES)}.")
    return RECIPES[name]

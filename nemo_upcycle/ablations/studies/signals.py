"""What a router learns from, beyond the loss."""

from nemo_upcycle.ablations.arms import Arm, Claim, Study
from nemo_upcycle.ablations.bases import Base

WARM_UP = 20
"""Steps in which only the routers learn."""

_LOSS_FREE = "arXiv 2408.15664"
_DROP = {"initializer": "drop(ratio=0.5)"}


def arms(base: Base) -> tuple[Arm, ...]:
    """Return the family's arms for a model."""
    return (
        Arm(
            "sigmoid_bias",
            "sigmoid, expert bias",
            numbers={
                "moe_router_score_function": "sigmoid",
                "moe_router_enable_expert_bias": True,
                "moe_router_load_balancing_type": "none",
            },
        ),
        Arm("normalized", "normalized logits, λ 1", numbers={"router_logit_normalization": 1.0}),
        Arm(
            "drop_warmup",
            f"drop(0.5), {WARM_UP} steps of router warm-up",
            numbers=_DROP,
            router_warmup_steps=WARM_UP,
        ),
        Arm(
            "drop_dense_gradient",
            "drop(0.5), dense gradient",
            numbers=_DROP | {"router_dense_gradient": True},
        ),
    )


STUDIES = (
    Study(
        "signals",
        "What should a router learn from?",
        ("e8t2", "sigmoid_bias", "normalized", "drop", "drop_warmup", "drop_dense_gradient"),
        (
            Claim(
                "Sigmoid scores and an expert bias end lower than softmax and an auxiliary loss",
                _LOSS_FREE,
                "sigmoid_bias",
                "e8t2",
            ),
            Claim(
                "They balance the load better",
                _LOSS_FREE,
                "sigmoid_bias",
                "e8t2",
                of="expert_load_cv",
            ),
            Claim(
                "Normalized logits end lower",
                "arXiv 2406.06563",
                "normalized",
                "e8t2",
            ),
            Claim(
                "Normalized logits drive experts further apart",
                "arXiv 2406.06563: more diverse experts",
                "e8t2",
                "normalized",
                of="expert_distance",
            ),
            Claim(
                "A router that is trained first ends lower",
                "arXiv 2410.01610, with routers trained on little data",
                "drop_warmup",
                "drop",
            ),
            Claim(
                "A dense router gradient ends lower",
                "DenseMixer, after pre-training",
                "drop_dense_gradient",
                "drop",
            ),
        ),
        "Warm-up and dense gradient need experts that differ, hence drop(0.5). A warm-up takes its "
        "steps from the other weights. FLOPs are those of the top-k; a dense gradient computes all "
        "experts.",
        shows_experts=True,
    ),
)

"""The shape of the MoE: capacity factor, order of softmax and top-k, granularity, scaling."""

from nemo_upcycle.ablations.arms import Arm, Claim, Study
from nemo_upcycle.ablations.bases import Base
from nemo_upcycle.ablations.studies.papers import LLAMA3, NVIDIA

G4 = {"granularity": 4, "moe_router_topk": 8}
_ST = {"moe_router_pre_softmax": True}
_G2 = {"granularity": 2, "moe_router_topk": 4}
_G8 = {"granularity": 8, "moe_router_topk": 16}


def arms(base: Base) -> tuple[Arm, ...]:
    """Return the family's arms for a model."""
    return (
        Arm("cf4", "CF 4", numbers={"moe_expert_capacity_factor": 4.0}),
        Arm("cf2", "CF 2", numbers={"moe_expert_capacity_factor": 2.0}),
        Arm("cf1", "CF 1", numbers={"moe_expert_capacity_factor": 1.0}),
        Arm("st", "ST-type, unscaled", numbers=_ST | {"weight_scaling": "none"}),
        Arm("st_paper", "ST-type, ∛ scaling", numbers=_ST | {"weight_scaling": "paper"}),
        Arm("st_exact", "ST-type, √ on up, down", numbers=_ST | {"weight_scaling": "exact"}),
        Arm("g2", "E8G2T4", numbers=_G2),
        Arm("g4", "E8G4T8", numbers=G4),
        Arm("g8", "E8G8T16", numbers=_G8),
        Arm("g4_paper", "E8G4T8, ∛ scaling", numbers=G4 | {"weight_scaling": "paper"}),
        Arm("g4_none", "E8G4T8, unscaled", numbers=G4 | {"weight_scaling": "none"}),
    )


STUDIES = (
    Study(
        "capacity_factor",
        "How many tokens may an expert take?",
        ("e8t2", "cf4", "cf2", "cf1"),
        (
            Claim(
                "CF 2 ends lower than dropless",
                f"{LLAMA3}, Table 4: MMLU 64.0 to 63.3 (0-shot 63.9 to 63.7)",
                "cf2",
                "e8t2",
            ),
            Claim(
                "CF 4 ends lower than dropless",
                f"{LLAMA3}, Table 4: MMLU 63.5 to 63.3; top-2 of 8 with CF 4 never drops a "
                "token, so the two compute the same",
                "cf4",
                "e8t2",
            ),
            Claim(
                "CF 1 ends higher than CF 2",
                f"{LLAMA3}, Table 4: MMLU 63.7 to 64.0 (0-shot 63.3 to 63.9)",
                "cf2",
                "cf1",
            ),
        ),
        "Nothing is padded, so all arms compute the same but for what is dropped. Losses are "
        "measured without dropping, as transformers would; beside them with the training's "
        "capacity, which 20 rows at a time share.",
    ),
    Study(
        "router",
        "Softmax after top-k (Mixtral-type) or before it (ST-type)?",
        ("e8t2", "st", "st_paper", "st_exact"),
        (
            Claim(
                "Mixtral-type starts lower than ST-type",
                f"{LLAMA3}, router ablation",
                "e8t2",
                "st",
                at="start",
            ),
            Claim(
                "Mixtral-type ends lower than ST-type",
                f"{LLAMA3}, router ablation: converges faster",
                "e8t2",
                "st",
            ),
            Claim(
                "ST-type with scaled weights ends lower than Mixtral-type",
                f"{NVIDIA}: softmax-then-top-k is better at scale",
                "st_paper",
                "e8t2",
            ),
            Claim("Scaling makes ST-type end lower", f"{NVIDIA}, Eq. 2", "st_paper", "st"),
        ),
    ),
    Study(
        "granularity",
        "Fewer wide experts or many narrow ones, at the same compute a token (T = 2G)?",
        ("e8t2", "g2", "g4", "g8"),
        (
            Claim(
                "64 experts (E8G8T16) end lower than 8",
                f"{NVIDIA}: the best granularity gives about 64 experts",
                "g8",
                "e8t2",
            ),
            Claim(
                "16 experts (E8G2T4) end lower than 8",
                f"{NVIDIA}: finer is better up to about 64 experts",
                "g2",
                "e8t2",
            ),
        ),
    ),
    Study(
        "weight_scaling",
        "Must the weights of granular experts be scaled, and how?",
        ("g4", "g4_paper", "g4_none"),
        (
            Claim(
                "Cube-root scaling ends lower than none",
                f"{NVIDIA}, Eq. 2",
                "g4_paper",
                "g4_none",
            ),
            Claim(
                "The scaling that keeps the dense function (√G on up and down) starts lower "
                "than the cube root",
                "this project's rule; see `weight_scaling`",
                "g4",
                "g4_paper",
                at="start",
            ),
            Claim(
                "And ends lower",
                "this project's rule; see `weight_scaling`",
                "g4",
                "g4_paper",
            ),
        ),
    ),
)

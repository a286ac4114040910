"""Where a training starts: the learning rate, and the experts' weights."""

from nemo_upcycle.ablations.arms import Arm, Claim, Study
from nemo_upcycle.ablations.bases import Base
from nemo_upcycle.ablations.studies.papers import NVIDIA, SPARSE_UPCYCLING

DROP_IS_LOWER = Claim(
    "Drop-Upcycling (ratio 0.5) ends lower than copies",
    "arXiv 2502.19261, over far longer trainings",
    "drop",
    "e8t2",
)


def arms(base: Base) -> tuple[Arm, ...]:
    """Return the family's arms for a model."""
    between = round((base.peak * base.minimum) ** 0.5, 5)
    constant = {"lr": base.minimum, "warmup_steps": 0}
    return (
        Arm("lr_between", f"peak {between:g}", schedule={"lr": between}),
        Arm("lr_minimum", f"constant {base.minimum:g}", schedule=constant),
        Arm("drop", "drop(0.5)", numbers={"initializer": "drop(ratio=0.5)"}),
        Arm("noise", "noise(0.02; 0.5)", numbers={"initializer": "noise(std=0.02; fraction=0.5)"}),
        Arm("random", "random(0.02)", numbers={"initializer": "random(std=0.02)"}),
        Arm(
            "hybrid",
            "hybrid(copy; drop(0.5))",
            numbers={"initializer": "hybrid(copy; drop(ratio=0.5))"},
        ),
    )


STUDIES = (
    Study(
        "learning_rate",
        "Back to the dense run's peak learning rate, or on at its minimum?",
        ("e8t2", "lr_between", "lr_minimum"),
        (
            Claim(
                "Resetting the learning rate ends lower than going on at the minimum",
                f"{NVIDIA}: resetting the learning rate wins",
                "e8t2",
                "lr_minimum",
            ),
            Claim(
                "Going on at the dense run's last learning rate ends lower than resetting it",
                "Sarashina2-8x70B, which kept the last rate of its dense model",
                "lr_minimum",
                "e8t2",
            ),
        ),
        "All but the constant one warm up and fall to the dense run's minimum along a cosine.",
    ),
    Study(
        "initializers",
        "Should experts start as copies?",
        ("e8t2", "drop", "noise", "random", "hybrid"),
        (
            DROP_IS_LOWER,
            Claim(
                "Copies start lower than Drop-Upcycling",
                "arXiv 2502.19261: dropping costs knowledge at first",
                "e8t2",
                "drop",
                at="start",
            ),
            Claim(
                "Copies end lower than random experts",
                SPARSE_UPCYCLING,
                "e8t2",
                "random",
            ),
        ),
    ),
)

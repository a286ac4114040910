"""Controls: the dense model trained further, and the same MoE from scratch."""

from nemo_upcycle.ablations.arms import Arm, Claim, Study
from nemo_upcycle.ablations.bases import Base
from nemo_upcycle.ablations.studies.papers import LLAMA3, NVIDIA, SPARSE_UPCYCLING


def arms(base: Base) -> tuple[Arm, ...]:
    """Return the family's arms for a model."""
    dense_batch = base.dense.schedule.global_batch_size
    return (
        Arm("dense", "dense, same tokens", start="dense"),
        Arm("dense_flops", "dense, same FLOPs", start="dense", budget="flops"),
        Arm("scratch", "scratch, same tokens", start="scratch"),
        Arm("scratch_flops", "scratch, dense run's FLOPs too", start="scratch", budget="all_flops"),
        Arm(
            "scratch_flops_dense",
            "the same, in the dense run's batches",
            start="scratch",
            numbers={"global_batch_size": dense_batch},
            budget="all_flops",
        ),
    )


STUDIES = (
    Study(
        "controls",
        "Does upcycling beat training the dense model on, or the MoE from scratch?",
        ("e8t2", "dense", "dense_flops", "scratch", "scratch_flops", "scratch_flops_dense"),
        (
            Claim(
                "At equal tokens the MoE ends lower than the dense model trained on",
                f"{LLAMA3}, Table 4: MMLU 63.3 (dropless) to 62.4; {NVIDIA}: validation loss "
                "1.306 to 1.377",
                "e8t2",
                "dense",
            ),
            Claim(
                "At equal FLOPs too",
                f"{SPARSE_UPCYCLING}: the upcycled models pass the dense ones at 50% of the "
                "dense pre-training's cost",
                "e8t2",
                "dense_flops",
            ),
            Claim(
                "At equal tokens it ends lower than the same MoE from scratch",
                f"{SPARSE_UPCYCLING}",
                "e8t2",
                "scratch",
            ),
            Claim(
                "It does even if the MoE from scratch is given the dense run's FLOPs too",
                f"{SPARSE_UPCYCLING}: better than sparse models from scratch on 100% of the dense "
                "pre-training's budget",
                "e8t2",
                "scratch_flops",
            ),
            Claim(
                "And if that one is trained in batches as large as the dense run's",
                f"{SPARSE_UPCYCLING}, the same",
                "e8t2",
                "scratch_flops_dense",
            ),
        ),
        "FLOPs are a training's own. Arms that start from the dense model profit from that "
        "model's training. The last two arms get the FLOPs of that training on top, in one "
        "schedule: the first with the batch size of all arms, and so more steps; the second "
        "with the dense run's batch size. All arms have the same peak and final learning rate.",
    ),
)

"""Routers and experts that know the data, from statistics of the dense model."""

from nemo_upcycle.ablations.arms import STATISTICS, Arm, Claim, Study
from nemo_upcycle.ablations.bases import Base
from nemo_upcycle.ablations.studies.architecture import G4

_FROM_PROMPTS = {"router_initializer": f"prompts(stats='{STATISTICS}')"}
_RIDGE = {"router_initializer": f"ridge(stats='{STATISTICS}')"}
_CENTROIDS = {"router_initializer": f"centroids(stats='{STATISTICS}')"}
_DUME = "arXiv 2603.29765, without training"
_CLUSTER_AWARE = "arXiv 2604.13508, with CLIP"
_OWN_HYPOTHESIS = "no paper: the hypothesis behind the initializer"


def arms(base: Base) -> tuple[Arm, ...]:
    """Return the family's arms for a model."""
    drop = {"initializer": "drop(ratio=0.5)"}
    return (
        *(_for_the_demos_text() if base.is_tiny else ()),
        Arm("centroids", "centroids", numbers=_CENTROIDS),
        Arm("drop_centroids", "drop(0.5), centroids", numbers=drop | _CENTROIDS),
        Arm(
            "partial",
            "partial(shared=0.5)",
            numbers={"initializer": f"partial(stats='{STATISTICS}'; shared=0.5)"},
        ),
        Arm(
            "cluster_svd",
            "cluster_svd, centroids",
            numbers=_CENTROIDS | {"initializer": f"cluster_svd(stats='{STATISTICS}')"},
        ),
        Arm(
            "g4_sorted",
            "E8G4T8, activation_sorted",
            numbers=G4 | {"initializer": f"activation_sorted(stats='{STATISTICS}')"},
        ),
    )


def _for_the_demos_text() -> tuple[Arm, ...]:
    """Return arms with prompts for the demo's text, and with branches of its two corpora."""
    return (
        Arm("prompts", "prompts", numbers=_FROM_PROMPTS),
        Arm("mixed", "a branch per corpus", mixed=True),
        Arm("mixed_ridge", "a branch per corpus, ridge", numbers=_RIDGE, mixed=True),
    )


STUDIES = (
    Study(
        "data_aware",
        "Do routers and experts gain from statistics of the dense model over the text?",
        (
            "e8t2",
            "centroids",
            "prompts",
            "cluster_svd",
            "mixed",
            "mixed_ridge",
            "drop",
            "drop_centroids",
            "partial",
            "g4",
            "g4_sorted",
        ),
        (
            Claim(
                "With copies, centroids end lower than random rows",
                _CLUSTER_AWARE,
                "centroids",
                "e8t2",
            ),
            Claim(
                "Centroids make the router more confident at the end",
                _CLUSTER_AWARE,
                "e8t2",
                "centroids",
                of="router_confidence",
            ),
            Claim(
                "Centroids drive experts further apart",
                _CLUSTER_AWARE,
                "e8t2",
                "centroids",
                of="expert_distance",
            ),
            Claim(
                "With copies, prompts end lower than random rows",
                "mergekit-moe, without training",
                "prompts",
                "e8t2",
            ),
            Claim(
                "With a branch per corpus, ridge starts lower than random rows",
                _DUME,
                "mixed_ridge",
                "mixed",
                at="start",
            ),
            Claim("And ends lower", f"{_DUME}; further training helps", "mixed_ridge", "mixed"),
            Claim(
                "Experts of low rank per cluster, with centroids, end lower than copies",
                _CLUSTER_AWARE,
                "cluster_svd",
                "e8t2",
            ),
            Claim(
                "And further apart",
                _CLUSTER_AWARE,
                "e8t2",
                "cluster_svd",
                of="expert_distance",
            ),
            Claim(
                "With drop(0.5), centroids end lower than random rows",
                _CLUSTER_AWARE,
                "drop_centroids",
                "drop",
            ),
            Claim(
                "Redrawing the least active neurons starts lower than redrawing any",
                _OWN_HYPOTHESIS,
                "partial",
                "drop",
                at="start",
            ),
            Claim("And ends lower", _OWN_HYPOTHESIS, "partial", "drop"),
            Claim(
                "Shards of equally active neurons end lower than shards in the dense order",
                "after arXiv 2502.04416, which splits without training",
                "g4_sorted",
                "g4",
            ),
        ),
        "Statistics are of the training text. Rows are as long as random rows. The rank is half "
        "the hidden size. Branches are the dense model after 100 more steps on each corpus, which "
        "tokens and FLOPs do not count: compare them with each other alone.",
        shows_experts=True,
    ),
)

"""The comparisons, and the papers' claims, as plain data: a module per family of studies.

Arms shared by several studies are trained once.
"""

from dataclasses import replace

from nemo_upcycle.ablations.arms import BASELINE, Arm, Claim, Study
from nemo_upcycle.ablations.bases import TINY, Base
from nemo_upcycle.ablations.studies import architecture, controls, data_aware, signals, training
from nemo_upcycle.ablations.studies.papers import NVIDIA
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture

_FAMILIES = (architecture, training, controls, data_aware, signals)


def arms_with(base: Base) -> dict[str, Arm]:
    """Return all arms for a model, by name; the baseline is first.

    Arms that get the dense run's FLOPs are left out where those are unknown.
    """
    arms = [Arm(BASELINE, "baseline: E8T2")]
    for family in _FAMILIES:
        arms += family.arms(base)
    return {
        arm.name: replace(arm, base=base)
        for arm in arms
        if arm.budget != "all_flops" or base.trained_by_dense
    }


ARMS = arms_with(TINY)
"""The tiny model's arms by name; the baseline is first."""

STUDIES = {
    study.name: study
    for family in (controls, architecture, training, data_aware, signals)
    for study in family.STUDIES
}
"""Studies by name for `--study`."""

_REAL_CONTROLS = ("dense", "dense_flops", "scratch")

REAL_MODEL = Study(
    "real_model",
    "Does upcycling a real model pay, and which way?",
    # In the order in which arms are left out where the time is short, from the end.
    ("e8t2", "dense", "dense_flops", "drop", "g4", "scratch"),
    (
        *(claim for claim in STUDIES["controls"].claims if claim.higher in _REAL_CONTROLS),
        training.DROP_IS_LOWER,
        Claim(
            "32 experts in virtual groups (E8G4T8) end lower than 8",
            f"{NVIDIA}: finer is better up to about 64 experts",
            "g4",
            "e8t2",
        ),
    ),
    "FLOPs are a training's own; those of the dense checkpoint's pre-training are not counted. All "
    "arms have the same learning rates, the ones of the upcycled recipe.",
)
"""The study of a recipe with a control: all that an hour on one GPU allows."""


def studies_named(names: list[str], base: Base = TINY) -> list[Study]:
    """Return the studies with these names; without names, the studies for the model.

    Args:
        names: Names of studies.
        base: The model, which may lack arms.

    Raises:
        UpcyclingError: There is no study with such a name.
    """
    offered = STUDIES if base.is_tiny else {REAL_MODEL.name: REAL_MODEL, **STUDIES}
    for name in names:
        if name not in offered:
            raise UpcyclingError(
                f"There is no study {name!r}; expected one of: {', '.join(offered)}."
            )
    wanted = names or list(STUDIES if base.is_tiny else [REAL_MODEL.name])
    return [study.of(arms_with(base)) for name, study in offered.items() if name in wanted]


def with_arms(studies: list[Study], names: list[str]) -> list[Study]:
    """Return studies with some of their arms alone, and the first of each; all without names.

    Raises:
        UpcyclingError: No study has such an arm.
    """
    if not names:
        return studies
    offered = list(dict.fromkeys(name for study in studies for name in study.arms))
    for name in names:
        if name not in offered:
            raise UpcyclingError(
                f"There is no arm {name!r} in these studies; expected one of: {', '.join(offered)}."
            )
    kept = [
        replace(study.of({study.arms[0], *names}), note=study.note)
        for study in studies
        if {*study.arms[1:]} & {*names}
    ]
    return kept or [studies[0].of({studies[0].arms[0]})]


def arms_of(studies: list[Study], base: Base = TINY) -> list[Arm]:
    """Return the distinct arms of studies, and the baseline, in the studies' order."""
    arms = arms_with(base)
    if len(studies) > 1 or base.is_tiny:
        names = {BASELINE, *(name for study in studies for name in study.arms)}
        return [arm for name, arm in arms.items() if name in names]
    return [arms[name] for name in dict.fromkeys([BASELINE, *studies[0].arms])]


def most_sequences(steps: int, arch: Architecture, base: Base = TINY) -> int:
    """Return the number of sequences in the longest arm of all studies."""
    return max(
        arm.steps(steps, arch) * arm.recipe.schedule.global_batch_size
        for arm in arms_with(base).values()
    )

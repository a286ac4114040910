"""`nemo-upcycle check`: all passes on a machine that is well, and each check can fail."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.check.findings import KILLED_AND_RESUMED, MAPPING_CHECKS, Outcome
from nemo_upcycle.config import ParallelFolding
from tests.distributed.pool import RankPool, nemo_recipe
from tests.thorough import thorough
from tests.tiny import write_dense

EP2, DP2 = ParallelFolding.of(ep=2), ParallelFolding()


@nemo_recipe  # joins and leaves the ranks itself
def run_check(
    out: Path,
    foldings: list[ParallelFolding] | None = None,
    breakages: Sequence[str] = (),
    without: Sequence[str] = (),
    **options: Any,
) -> Outcome:
    """Run a check in this process.

    Args:
        out: Directory for files.
        foldings: The only mappings that are checked; None for all.
        breakages: Functions of `check_breakages`, which break this process.
        without: Methods of `Check` that do nothing.
        options: Fields of `Options`.
    """
    import pytest

    from nemo_upcycle.check import job
    from tests.distributed import check_breakages

    with pytest.MonkeyPatch.context() as patch:
        if foldings is not None:
            patch.setattr(job, "mappings", lambda *_: foldings)
        if "dense" not in options:
            patch.setattr(job, "one_rank", check_breakages.one_rank_of_the_tiny_model)
        for name in without:
            patch.setattr(job.Check, name, lambda *_: None)
        for name in breakages:
            patch.setattr(*getattr(check_breakages, name)())
        return job.Check(job.Options(out, **options), lambda _: None).run()


def failed(outcome: Outcome) -> set[tuple[str, str]]:
    return {(finding.mapping, finding.check) for finding in outcome.failures}


@pytest.fixture(scope="module")
def well(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """The check of two ranks of this machine, and its directory."""
    out = tmp_path_factory.mktemp("check")
    first, second = ranks.run(run_check, 2, out=out, hardware="h100")
    assert first == second
    return first, out


def test_all_passes(well: tuple[Outcome, Path]) -> None:
    outcome, _ = well
    assert not [str(finding) for finding in outcome.failures]
    assert outcome.passed
    by_mapping = dict(outcome.by_mapping())
    assert len(by_mapping) == 10
    assert all(found.keys() >= set(MAPPING_CHECKS) for found in by_mapping.values())
    (resumed,) = (f for f in outcome.findings if f.check == KILLED_AND_RESUMED)
    assert "step 3" in resumed.found


def test_files(well: tuple[Outcome, Path]) -> None:
    from nemo_upcycle.planner.hardware import hardware

    outcome, out = well
    assert {path.name for path in out.iterdir()} == {"check.json", "hardware.yaml"}
    slowest = min(b.measured for b in outcome.bandwidths if b.collective.startswith("all-"))
    assert 0 < hardware(str(out / "hardware.yaml")).nvlink_bandwidth < 450
    assert slowest > 0
    assert [b.collective for b in outcome.bandwidths] == [
        "all-reduce",
        "all-gather",
        "all-to-all",
        "point to point",
    ]


@pytest.mark.parametrize(
    ("breakage", "expected"),
    [
        ("wrong_groups", "groups"),
        thorough(("groups_not_as_planned", "groups")),
        ("zero_expert", "step 0"),
        thorough(("experts_in_another_order", "export")),
        thorough(("experts_trained_in_another_order", "loss")),
        ("doubled_gradient", "gradient norm"),
    ],
)
def test_a_fault_is_found(ranks: RankPool, tmp_path: Path, breakage: str, expected: str) -> None:
    outcome, _ = ranks.run(
        run_check, 2, out=tmp_path, foldings=[EP2], breakages=[breakage], without=["_restart"]
    )
    assert (str(EP2), expected) in failed(outcome), [str(f) for f in outcome.findings]
    assert not outcome.passed


def test_what_is_not_loaded_is_found(ranks: RankPool, tmp_path: Path) -> None:
    outcome, _ = ranks.run(
        run_check,
        2,
        out=tmp_path,
        foldings=[DP2, EP2],
        breakages=["lost_while_loading"],
        without=["_restart"],
    )
    assert (str(EP2), "load elsewhere") in failed(outcome)
    (finding,) = (f for f in outcome.failures if f.check == "load elsewhere")
    assert finding.found.startswith("on rank 1: 1 parameters that differ")


def test_an_error_of_one_rank_is_told_and_the_next_mapping_runs(
    ranks: RankPool, tmp_path: Path
) -> None:
    outcome, _ = ranks.run(
        run_check,
        2,
        out=tmp_path,
        foldings=[DP2, EP2],
        breakages=["error_on_one_rank"],
        without=["_restart"],
    )
    (finding,) = outcome.failures
    assert (finding.mapping, finding.check) == (str(DP2), "step 0")
    assert finding.found == "rank 1: ValueError: no such layer"
    assert len(dict(outcome.by_mapping())[str(EP2)]) == len(MAPPING_CHECKS)


@pytest.mark.parametrize(
    ("breakages", "found"),
    [
        (["killed_in_this_process", "optimizer_not_loaded"], "losses step 3"),
        thorough((["never_killed"], "exit code 0")),
    ],
)
def test_a_bad_resume_is_found(
    ranks: RankPool, tmp_path: Path, breakages: list[str], found: str
) -> None:
    outcome, _ = ranks.run(
        run_check, 2, out=tmp_path, foldings=[EP2], breakages=breakages, without=["_mappings"]
    )
    assert failed(outcome) == {(str(EP2), KILLED_AND_RESUMED)}
    assert found in outcome.failures[0].found


@pytest.mark.parametrize("family", [*map(thorough, ("llama", "qwen2, tied", "nemotron")), "qwen3"])
def test_a_users_model(ranks: RankPool, tmp_path: Path, family: str) -> None:
    dense = write_dense(tmp_path / "dense", family)
    outcome, _ = ranks.run(
        run_check,
        2,
        out=tmp_path / "out",
        foldings=[EP2],
        without=["_restart"],
        dense=str(dense),
        layers=2,
    )
    assert not [str(finding) for finding in outcome.failures]
    assert "2 layers" in outcome.subject


@pytest.mark.slow
def test_four_ranks(ranks: RankPool, tmp_path: Path) -> None:
    outcome = ranks.run(run_check, 4, out=tmp_path)[0]
    assert not [str(finding) for finding in outcome.failures]
    assert any("PP2 VPP2 · ETP1 EP2" in finding.mapping for finding in outcome.findings)

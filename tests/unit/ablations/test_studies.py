"""Studies, statistics, verdicts, tables, and which results are taken again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nemo_upcycle.ablations import arms as ablation_arms
from nemo_upcycle.ablations import runner, studies
from nemo_upcycle.ablations.arms import BASELINE, Arm, Claim, Study
from nemo_upcycle.ablations.bases import BATCH, TINY, base_of
from nemo_upcycle.ablations.inputs import Inputs, branches_of, with_statistics
from nemo_upcycle.ablations.picture import draw
from nemo_upcycle.ablations.report import Report, report_of, to_json
from nemo_upcycle.ablations.results import OVER_TIME, Job, Result, Workspace, jobs_of
from nemo_upcycle.ablations.studies import ARMS, STUDIES, arms_with
from nemo_upcycle.ablations.tables import EXPERTS, markdown
from nemo_upcycle.cli import app
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.model import upcycled_model
from nemo_upcycle.initializers import make_initializer
from nemo_upcycle.planner.flops import flops
from tests.tiny import write_llama

STEPS = 100


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Data in name only, and a dense checkpoint."""
    directory = tmp_path / "demo"
    write_llama(directory / "dense_hf")
    _write_manifests(directory, "of the text")
    return Workspace(directory)


def _write_manifests(directory: Path, content: str) -> None:
    (directory / "data").mkdir(exist_ok=True)
    for name in ("documentation", "sources"):
        manifest = {"files": {f"{name}.bin": {"sha256": content}}}
        (directory / "data" / f"{name}.bin").touch()
        (directory / "data" / f"{name}.manifest.json").write_text(json.dumps(manifest))


def result(end: float, start: float = 5.0, **others: Any) -> Result:
    values = {"capped_start": start, "capped_end": end, "dropped": 0.0} | others
    return Result(start=start, end=end, held_out_tokens=51_200, seconds=60.0, **values)


def done(workspace: Workspace, study: Study, ends: dict[str, list[float]], **others) -> Report:
    """Return the report of a study whose arms ended so, seed by seed."""
    arms = [ARMS[name] for name in ends]
    seeds = len(next(iter(ends.values())))
    jobs = jobs_of(arms, seeds, STEPS, workspace, workspace.directory.parent / "results")
    for job in jobs:
        extra = others.get(job.arm.name, {})
        job.keep(result(ends[job.arm.name][job.seed - 1], **extra))
    return report_of([study], jobs, STEPS)


class TestStudies:
    @pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
    def test_the_recipe_takes_an_arm(self, arm: Arm) -> None:
        recipe = arm.recipe
        assert (recipe.upcycling.num_moe_experts is None) == (arm.start == "dense")
        assert arm.start in ablation_arms.STARTS
        assert arm.budget in ablation_arms.BUDGETS
        taken = vars(recipe.upcycling) | vars(recipe.schedule)
        for name, value in {**BATCH, **arm.numbers, **arm.schedule}.items():
            assert taken[name] == value

    def test_every_arm_is_in_a_study_and_every_claim_of_its_study(self) -> None:
        asked = {name for study in STUDIES.values() for name in study.arms}
        assert asked == set(ARMS)
        for study in STUDIES.values():
            assert study.claims
            for claim in study.claims:
                assert {claim.lower, claim.higher} <= set(study.arms)
                assert claim.at in ("start", "end")
                assert claim.of == "loss" or (claim.of in OVER_TIME and study.shows_experts)

    def test_arms_differ(self) -> None:
        made = {
            repr((arm.recipe, arm.start, arm.budget, arm.router_warmup_steps, arm.mixed))
            for arm in ARMS.values()
        }
        assert len(made) == len(ARMS)

    def test_active_compute_is_the_same_for_every_granularity(self) -> None:
        arch = ARMS[BASELINE].recipe.architecture
        counted = {ARMS[name].flops_per_step(arch) for name in STUDIES["granularity"].arms}
        assert len(counted) == 1

    def test_budgets_are_equal(self) -> None:
        arch = ARMS[BASELINE].recipe.architecture
        of = {
            name: ARMS[name].steps(1000, arch) * ARMS[name].flops_per_step(arch)
            for name in STUDIES["controls"].arms
        }
        assert of["dense"] < of["e8t2"] == of["scratch"] < of["scratch_flops"]
        assert of["dense_flops"] == pytest.approx(of["e8t2"], rel=1e-3)
        dense = TINY.dense
        per_sequence = flops(upcycled_model(arch, dense.upcycling), 256).training
        before = per_sequence * 16 * 250
        assert of["scratch_flops"] == pytest.approx(of["e8t2"] + before, rel=1e-3)
        assert of["scratch_flops_dense"] == pytest.approx(of["e8t2"] + before, rel=1e-3)

    def test_an_arm_of_several_studies_is_trained_once(self) -> None:
        arms = studies.arms_of(list(STUDIES.values()))
        assert len({arm.name for arm in arms}) == len(arms) == len(ARMS)
        assert [arm.name for arm in studies.arms_of([STUDIES["weight_scaling"]])] == [
            "e8t2", "g4", "g4_paper", "g4_none",
        ]  # fmt: skip

    def test_the_help_names_all_studies(self) -> None:
        shown = CliRunner().invoke(app, ["ablate", "--help"], env={"COLUMNS": "1000"}).output
        assert f"{', '.join(STUDIES)};" in " ".join(shown.split())

    def test_some_arms_alone(self) -> None:
        asked = [STUDIES["data_aware"], STUDIES["router"], STUDIES["signals"]]
        kept = studies.with_arms(asked, ["prompts", "drop_warmup", "drop"])
        assert [(study.name, study.arms) for study in kept] == [
            ("data_aware", ("e8t2", "prompts", "drop")),
            ("signals", ("e8t2", "drop", "drop_warmup")),
        ]
        assert [claim.lower for claim in kept[1].claims] == ["drop_warmup"]
        assert kept[0].note == STUDIES["data_aware"].note
        assert studies.with_arms(asked, []) == asked
        with pytest.raises(UpcyclingError, match="no arm 'dense' in these studies; expected one"):
            studies.with_arms(asked, ["dense"])

    def test_an_unknown_study_is_an_error(self) -> None:
        assert studies.studies_named(["router"]) == [STUDIES["router"]]
        assert studies.studies_named([]) == list(STUDIES.values())
        with pytest.raises(UpcyclingError, match="no study 'rooter'; expected one of: controls"):
            studies.studies_named(["rooter"])


CLAIMED = Study(
    "tried",
    "Which?",
    ("e8t2", "cf1", "st"),
    (
        Claim("one is lower", "a paper", lower="cf1", higher="e8t2"),
        Claim("st is lower", "a paper", lower="st", higher="e8t2"),
        Claim("it starts lower", "a paper", lower="e8t2", higher="st", at="start"),
    ),
)


class TestReport:
    @pytest.fixture
    def report(self, workspace: Workspace) -> Report:
        ends = {"e8t2": [4.0, 4.2, 4.1], "cf1": [3.9, 4.1, 4.01], "st": [4.1, 4.1, 4.1]}
        return done(workspace, CLAIMED, ends, cf1={"dropped": 0.25}, st={"start": 6.0})

    def test_differences_are_paired_by_seed(self, report: Report) -> None:
        _, cf1, _ = report.studies[0].rows
        assert cf1.differences == pytest.approx((-0.1, -0.1, -0.09))
        assert cf1.difference.error == pytest.approx(0.0033, abs=1e-4)
        assert cf1.end.error == pytest.approx(0.0577, abs=1e-3)  # the seeds' own spread

    def test_verdicts(self, report: Report) -> None:
        found = [finding.verdict for finding in report.studies[0].findings]
        assert found == [
            "holds",
            "cannot be told with 3 seeds",
            "holds",
        ]

    def test_the_table(self, report: Report) -> None:
        text = markdown(report, "ablations.png")
        assert "| tried | one is lower | holds |" in text
        assert (
            "| arm | loss at first | at the end | difference | with its capacity | dropped |"
            in text
        )
        (row,) = [line for line in text.splitlines() if line.startswith("| CF 1 |")]
        assert "| 4.0033 ± 0.0578 | -0.0967 ± 0.0033 |" in row
        assert "| 25.0% |" in row
        assert f"| {STEPS * 8 * 256:,} |" in row
        assert "- one is lower (a paper): **holds (+0.0967 ± 0.0033, +0.0823 to +0.1110)**." in text

    def test_the_numbers(self, report: Report, workspace: Workspace) -> None:
        jobs = jobs_of([ARMS["cf1"]], 3, STEPS, workspace, workspace.directory.parent / "results")
        found = json.loads(to_json(report, jobs))
        assert [one["end"] for one in found["trainings"]] == [3.9, 4.1, 4.01]
        assert found["studies"][0]["claims"][0]["verdict"] == "holds"

    def test_the_picture(self, report: Report, tmp_path: Path) -> None:
        draw(report, tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


class TestResults:
    @pytest.fixture
    def job(self, workspace: Workspace, tmp_path: Path) -> Job:
        (job,) = jobs_of([ARMS["cf2"]], 1, STEPS, workspace, tmp_path / "results")
        return job

    def test_a_result_is_kept(self, job: Job) -> None:
        assert job.result() is None
        job.keep(result(4.0))
        assert job.result() == result(4.0)
        assert [path.name for path in job.results.iterdir()] == ["cf2-1.json"]

    @pytest.mark.parametrize(
        "change",
        [
            {"steps": STEPS + 1},
            {"seed": 2},
            {"samples": 1},
            {"arm": replace(ARMS["cf2"], numbers={"moe_expert_capacity_factor": 3.0})},
            {"arm": replace(ARMS["cf2"], schedule={"lr": 1e-3})},
            {"arm": replace(ARMS["cf2"], start="scratch")},
        ],
        ids=str,
    )
    def test_another_training_has_another_key(self, job: Job, change: dict[str, object]) -> None:
        assert replace(job, **change).key != job.key

    def test_a_result_of_another_training_is_not_taken(self, job: Job) -> None:
        job.keep(result(4.0))
        assert replace(job, steps=STEPS + 1).result() is None

    def test_a_label_makes_no_difference(self, job: Job) -> None:
        job.keep(result(4.0))
        assert replace(job, arm=replace(job.arm, label="another")).result() == result(4.0)

    def test_another_dense_checkpoint_or_other_data_are_seen(self, job: Job) -> None:
        job.keep(result(4.0))
        directory = job.workspace.directory
        again = replace(job, workspace=Workspace(directory))
        assert again.result() == result(4.0)
        _write_manifests(directory, "of other text")
        assert replace(job, workspace=Workspace(directory)).result() is None
        _write_manifests(directory, "of the text")
        assert replace(job, workspace=Workspace(directory)).result() == result(4.0)
        write_llama(directory / "dense_hf", seed=7)
        assert replace(job, workspace=Workspace(directory)).result() is None

    @pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": 1}'])
    def test_a_damaged_result_is_not_taken(self, job: Job, damage: str) -> None:
        job.keep(result(4.0))
        job.path.write_text(damage)
        assert job.result() is None

    def test_same_seed_same_sequences(self, workspace: Workspace, tmp_path: Path) -> None:
        """Megatron shuffles by the number of sequences, which must not depend on the arm."""
        all_jobs = jobs_of(list(ARMS.values()), 2, STEPS, workspace, tmp_path)
        few_jobs = jobs_of([ARMS["e8t2"]], 1, STEPS, workspace, tmp_path)
        assert {job.samples for job in all_jobs} == {few_jobs[0].samples}
        sizes = [job.steps * job.arm.recipe.schedule.global_batch_size for job in all_jobs]
        assert few_jobs[0].samples == max(sizes)


class TestExperts:
    """What is measured of routers and experts over time."""

    STUDY = replace(
        CLAIMED,
        claims=(
            Claim("cf1 is surer", "a paper", lower="e8t2", higher="cf1", of="router_confidence"),
            Claim(
                "st began further apart",
                "a paper",
                lower="e8t2",
                higher="st",
                at="start",
                of="expert_distance",
            ),
        ),
        shows_experts=True,
    )

    @pytest.fixture
    def report(self, workspace: Workspace) -> Report:
        ends = {"e8t2": [4.0, 4.2], "cf1": [3.9, 4.1], "st": [4.1, 4.1]}
        measured = {"e8t2": (0.2, 0.0), "cf1": (0.3, 0.5), "st": (0.2, 0.25)}
        over_time = {
            arm: {"over_time": {"router_confidence": [0.1, surer], "expert_distance": [apart, 1.0]}}
            for arm, (surer, apart) in measured.items()
        }
        return done(workspace, self.STUDY, ends, **over_time)

    def test_a_claim_is_about_what_it_names(self, report: Report) -> None:
        surer, apart = report.studies[0].findings
        assert surer.difference.mean == pytest.approx(0.1)
        assert apart.difference.mean == pytest.approx(0.25)
        assert surer.verdict == apart.verdict == "holds"

    def test_the_table_shows_their_course(self, report: Report) -> None:
        lines = markdown(report, "ablations.png").splitlines()
        (head,) = [number for number, line in enumerate(lines) if "| confidence |" in line]
        assert lines[head] == "| arm | " + " | ".join(EXPERTS) + " |"
        assert "| CF 1 |  | 0.100 → 0.300 ± 0.000 |" in lines[head + 3]
        numbers = json.loads(to_json(report, []))
        assert (
            numbers["studies"][0]["arms"]["st"]["over_time"]["expert_distance"][0]["mean"] == 0.25
        )


class TestStatistics:
    def test_arms_name_a_file_that_does_not_count(self, workspace: Workspace) -> None:
        arm = ARMS["cluster_svd"]
        assert arm.needs_statistics and not ARMS["drop"].needs_statistics
        jobs = [
            Job(arm, 1, STEPS, 1, workspace, workspace.directory, file)
            for file in (None, Path("/one"), Path("/another"))
        ]
        assert len({job.key for job in jobs}) == 1
        upcycling = with_statistics(arm.recipe.upcycling, Path("/one"))
        assert upcycling.initializer == "cluster_svd(stats='/one')"
        assert upcycling.router_initializer == "centroids(stats='/one')"
        make_initializer(upcycling.initializer)

    def test_arms_that_mix_branches_get_the_branches_and_their_statistics(
        self, workspace: Workspace, tmp_path: Path
    ) -> None:
        branches = branches_of(ARMS["mixed"], workspace, tmp_path)
        assert [branch.name for branch in branches] == ["documentation-1", "sources-1"]
        inputs = Inputs(Path("/dense"), tuple(branches), Path("/branches"))
        jobs = {
            name: inputs.given_to(Job(ARMS[name], 1, STEPS, 1, workspace, tmp_path))
            for name in ("e8t2", "prompts", "mixed", "mixed_ridge")
        }
        weights = f"{tmp_path}/documentation; {tmp_path}/sources"
        assert {name: (job.dense_checkpoint, job.statistics) for name, job in jobs.items()} == {
            "e8t2": (str(workspace.dense), None),
            "prompts": (str(workspace.dense), Path("/dense")),
            "mixed": (weights, None),
            "mixed_ridge": (weights, Path("/branches")),
        }
        longer = tuple(replace(branch, steps=STEPS + 1) for branch in branches)
        assert replace(jobs["mixed"], branches=longer).key != jobs["mixed"].key
        assert len({job.key for job in [*jobs.values(), *branches]}) == 6

    def test_a_branch_without_weights_is_trained_again(
        self, workspace: Workspace, tmp_path: Path
    ) -> None:
        branch = branches_of(ARMS["mixed"], workspace, tmp_path)[0]
        branch.keep(result(4.0))
        assert branch.result() is None
        write_llama(tmp_path / "documentation")
        assert branch.result() == result(4.0)

    def test_a_real_model_has_no_arms_for_the_demos_text(self) -> None:
        real = base_of("smollm2_135m_e8t2")
        (study,) = studies.studies_named(["data_aware"], real)
        assert "centroids" in study.arms
        assert not {"prompts", "mixed", "mixed_ridge"} & {*study.arms, *arms_with(real)}

    def test_a_warm_up_counts(self, workspace: Workspace) -> None:
        arms = (ARMS["drop"], ARMS["drop_warmup"])
        jobs = [Job(arm, 1, STEPS, 1, workspace, workspace.directory) for arm in arms]
        assert jobs[0].key != jobs[1].key


class TestErrors:
    @pytest.mark.parametrize(
        "missing", ["data/sources.manifest.json", "data/sources.bin", "dense_hf/config.json"]
    )
    def test_a_demo_that_is_not_there(self, workspace: Workspace, missing: str) -> None:
        (workspace.directory / missing).unlink()
        with pytest.raises(UpcyclingError, match="`make demo` makes them") as error:
            Workspace(workspace.directory)
        assert str(workspace.directory / missing.removesuffix("/config.json")) in str(error.value)

    def test_two_commands_in_one_directory(self, workspace: Workspace, tmp_path: Path) -> None:
        with (
            runner._alone_in(tmp_path),
            pytest.raises(UpcyclingError, match="Another command is writing to"),
        ):
            runner.ablate(runner.Question([CLAIMED], 1, 1), workspace, tmp_path, 1, print)

"""A command as a job of NeMo-Run, up to the script that Slurm gets."""

import io
import sys
from pathlib import Path

import nemo_run as run
import pytest

from nemo_upcycle.cli.submit import add_job, check_settings
from nemo_upcycle.errors import UpcyclingError

SLURM = ["run.executor=slurm_bare", "run.executor.nodes=2", "run.executor.ntasks_per_node=4"]


def test_the_job_runs_the_command_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # NeMo-Run's tunnel reads it
    monkeypatch.setattr(sys, "argv", ["nemo-upcycle", "check", "--layers", "2", *SLURM])
    with run.Experiment("check") as experiment:
        add_job(experiment, "check", SLURM, tmp_path / "out")
        experiment.dryrun(delete_exp_dir=False)
    said = "".join(capsys.readouterr().out.split())  # a console may break long lines
    for expected in (
        f"-m nemo_upcycle.cli check --layers 2 --out {tmp_path / 'out'}",
        "--nnodes 2 --nproc-per-node 4",
        "#SBATCH --nodes=2",
        "export TORCHX_MAX_RETRIES=0",
    ):
        assert expected.replace(" ", "") in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["out"], "'out' is no option; expected run.executor=NAME"),
        (["run.executor.nodes=2"], "No executor is named"),
    ],
)
def test_other_words_are_refused(words: list[str], expected: str) -> None:
    with pytest.raises(UpcyclingError, match=expected):
        check_settings(words)

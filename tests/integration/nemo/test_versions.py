"""Versions beside NeMo with which its LLM collection has no `pretrain`: one clear error."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.nemo.versions import check_lightning, check_pretrain
from tests.thorough import thorough

WITHOUT_NEPTUNE = "import lightning.pytorch.loggers as loggers\ndel loggers.NeptuneLogger\n"
"""What a later Lightning does, before anything imports NeMo."""


def test_a_lightning_without_neptunes_logger_is_refused() -> None:
    with pytest.raises(UpcyclingError, match=r"no NeptuneLogger.*pip install 'lightning==2\.4\.0'"):
        check_lightning(SimpleNamespace(TensorBoardLogger=object))
    check_lightning(SimpleNamespace(NeptuneLogger=object))


def test_a_collection_without_pretrain_gives_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "__init__.py").touch()
    (tmp_path / "half" / "api.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UpcyclingError, match="has no `pretrain`: No module named 'a_package_that"):
        check_pretrain(ModuleType("half"))


@pytest.mark.parametrize(
    "module", [thorough("nemo_upcycle.nemo.strategy"), "nemo_upcycle_recipes.factory"]
)
def test_the_error_comes_before_nemos_own(tmp_path: Path, module: str) -> None:
    found = _python(tmp_path, f"{WITHOUT_NEPTUNE}import {module}\n")
    assert found.stderr.splitlines()[-1].startswith("nemo_upcycle.errors.UpcyclingError: Lightning")


def test_the_command_ends_with_the_error(tmp_path: Path) -> None:
    """NeMo-Run itself would say that there is no command `pretrain`."""
    command = "import sys\nsys.argv = ['nemo', 'llm', 'pretrain', '--factory', 'llama_tiny']\n"
    found = _python(
        tmp_path, f"{WITHOUT_NEPTUNE}{command}from nemo_run.__main__ import app\napp()\n"
    )
    assert found.returncode == 1
    assert "Error: Lightning 2.4.0 has no NeptuneLogger" in found.stderr


def _python(directory: Path, code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"NEMORUN_HOME": str(directory / "home")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=directory, env=environment, capture_output=True, text=True,
    )  # fmt: skip

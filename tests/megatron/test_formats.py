"""Checkpoints of Megatron-LM and Megatron-Bridge are exported, to the same bytes as NeMo's."""

from pathlib import Path

import pytest

from nemo_upcycle.checkpoint.beside import UPCYCLED_FROM
from nemo_upcycle.checkpoint.megatron import RUN_CONFIG
from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.trained.export import export
from nemo_upcycle.trained.opened import open_trained
from tests.distributed.pool import RankPool
from tests.megatron import formats
from tests.megatron.scenarios import UPCYCLING
from tests.stacks import EXPORT_DIGEST, files_digest, write_by_numbers

FOLDINGS = {
    "TP4": (4, ParallelFolding.of(tp=4)),  # which pads the vocabulary
    "PP2 VPP2 EP2": (4, ParallelFolding.of(pp=2, vpp=2, ep=2)),
}


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_by_numbers(tmp_path_factory.mktemp("formats") / "dense")


@pytest.mark.parametrize("name", FOLDINGS)
@pytest.mark.parametrize("program", formats.PROGRAMS)
def test_the_export_is_that_of_the_nemo_front(
    ranks: RankPool, numbers: Path, tmp_path: Path, program: str, name: str
) -> None:
    world_size, folding = FOLDINGS[name]
    run = tmp_path / "run"
    given = {"dense": numbers, "folding": folding, "upcycling": UPCYCLING}
    ranks.run(formats.save, world_size, run=run, program=program, **given)
    for number, source in enumerate((run, run / "iter_0000003")):
        export(source, tmp_path / f"exported-{number}")
        assert files_digest(tmp_path / f"exported-{number}") == EXPORT_DIGEST


@pytest.mark.parametrize("program", formats.PROGRAMS)
def test_without_the_record_the_model_is_known(
    ranks: RankPool, numbers: Path, tmp_path: Path, program: str
) -> None:
    run = tmp_path / "run"
    given = {"dense": numbers, "folding": ParallelFolding(), "upcycling": UPCYCLING}
    ranks.run(formats.save, 1, run=run, program=program, **given)
    (run / UPCYCLED_FROM).unlink()
    model = open_trained(run).model
    assert (model.num_experts, model.topk, model.expert_width) == (8, 2, 96)
    assert (model.arch.vocab_size, model.arch.activation) == (250, "swiglu")
    assert model.arch.init_method_std == 0.1


def test_a_damaged_run_config_is_said(ranks: RankPool, numbers: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = {"dense": numbers, "folding": ParallelFolding(), "upcycling": UPCYCLING}
    ranks.run(formats.save, 1, run=run, program="Megatron-Bridge", **given)
    path = run / "iter_0000003" / RUN_CONFIG
    path.write_text("model: [")
    with pytest.raises(UpcyclingError, match=r"cannot be read as Megatron-Bridge's run_config"):
        open_trained(run)

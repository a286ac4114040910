"""Whatever a `config.json` says, Megatron's model computes what transformers does, or is refused.

Random tiny checkpoints of each family (`config_draws`) are opened by this package, by transformers
4 and by transformers 5. `UPCYCLE_FUZZ=1000` draws as many per family; a draw is its seed.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.config_words import in_words_of_transformers_4
from tests.distributed import transformers5
from tests.distributed.config_draws import FAMILIES, write
from tests.distributed.pool import RankPool, nemo_recipe
from tests.tiny import tokens

pytestmark = pytest.mark.thorough

DRAWS = int(os.environ.get("UPCYCLE_FUZZ", "40"))
IDS = tokens(rows=2, length=40, vocab_size=96)
TOLERANCE = 2e-5
ACCEPTED = 0.3
CHUNK = 50

Outcome = torch.Tensor | str
"""Logits, or why there are none."""


@nemo_recipe
def outcomes(directories: list[Path], ids: torch.Tensor) -> list[tuple[Outcome, list[Outcome]]]:
    """Return what this package and transformers 4 make of each directory."""
    return [(_ours(directory, ids), _transformers_4(directory, ids)) for directory in directories]


def _ours(directory: Path, ids: torch.Tensor) -> Outcome:
    from nemo_upcycle.evaluation.opening import open_model

    try:
        with torch.no_grad():
            return open_model(directory, dtype="float32", megatron=True)(input_ids=ids).logits
    except UpcyclingError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"crashed: {type(error).__name__}: {error}"


def _transformers_4(directory: Path, ids: torch.Tensor) -> list[Outcome]:
    """Compute with the file as it is, if its words are those of 4, and with its translation."""
    words = json.loads((directory / "config.json").read_text())
    found = [] if words.get("rope_parameters") else [_computed(directory, words, ids)]
    try:
        words = in_words_of_transformers_4(words)
    except UpcyclingError:
        return found
    return [*found, _computed(directory, words, ids)]


def _computed(directory: Path, words: dict[str, Any], ids: torch.Tensor) -> Outcome:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.for_model(**words)
        model = AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=torch.float32)
        with torch.no_grad():
            return model.eval()(ids).logits
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.fixture(scope="module")
def found(
    ranks: RankPool, transformers_5: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[Path, tuple[Outcome, list[Outcome]]]:
    """For each draw's directory, what this package and what transformers 4 and 5 make of it."""
    root = tmp_path_factory.mktemp("draws")
    every = [
        write(root / family / str(seed), family, seed)
        for family in FAMILIES
        for seed in range(DRAWS)
    ]
    ids, logits = root / "ids", root / "logits"
    torch.save(IDS, ids)
    names = json.dumps([str(directory) for directory in every])
    process = transformers5.start(
        transformers_5, transformers5.LOGITS, names, str(ids), str(logits)
    )
    answers: list[tuple[Outcome, list[Outcome]]] = []
    for start in range(0, len(every), CHUNK):
        directories = every[start : start + CHUNK]
        answers += ranks.run(outcomes, 1, directories=directories, ids=IDS)[0]
    transformers5.end(process)
    of_5 = torch.load(logits)
    return {
        directory: (ours, [*of_4, of_5[str(directory)]])
        for directory, (ours, of_4) in zip(every, answers, strict=True)
    }


def test_equal_or_refused(found: dict[Path, tuple[Outcome, list[Outcome]]]) -> None:
    wrong = [
        f"{directory.parent.name} {directory.name}: {problem}\n"
        + (directory / "config.json").read_text()
        for directory, (ours, judges) in found.items()
        if (problem := verdict(ours, judges)) is not None
    ]
    assert not wrong, f"{len(wrong)} of {len(found)} draws:\n" + "\n".join(wrong)


def test_not_all_is_refused(found: dict[Path, tuple[Outcome, list[Outcome]]]) -> None:
    accepted = Counter(
        directory.parent.name for directory, (ours, _) in found.items() if not isinstance(ours, str)
    )
    assert all(accepted[family] >= ACCEPTED * DRAWS for family in FAMILIES), accepted


def verdict(ours: Outcome, judges: list[Outcome]) -> str | None:
    """Return what is wrong with an outcome, if anything."""
    if isinstance(ours, str):
        return None if ours.startswith("refused") else ours
    computed = [judge for judge in judges if not isinstance(judge, str) and judge.isfinite().all()]
    if not computed:
        return f"accepted, but transformers says {judges}"
    errors = [float((ours - judge).abs().max() / judge.abs().max()) for judge in computed]
    if max(errors) <= TOLERANCE:
        return None
    told = [judge if isinstance(judge, str) else "computed" for judge in judges]
    return f"off by {errors} ({told})"

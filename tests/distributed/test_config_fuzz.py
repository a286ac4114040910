"""Whatever a `config.json` says, Megatron's model computes what transformers does, or is refused.

Random tiny checkpoints of each family (`config_draws`) are opened by this package, by transformers
4 and by transformers 5. `UPCYCLE_FUZZ=1000` draws as many per family.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.mapping.config_words import in_words_of_transformers_4
from tests.distributed import transformers5
from tests.distributed.config_draws import FAMILIES, write
from tests.distributed.pool import RankPool, nemo_recipe
from tests.tiny import tokens

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


def test_equal_or_refused(ranks: RankPool, transformers_5: Path, tmp_path: Path) -> None:
    draws = {
        family: [write(tmp_path / family / str(seed), family, seed) for seed in range(DRAWS)]
        for family in FAMILIES
    }
    torch.save(IDS, tmp_path / "ids")
    every = [directory for directories in draws.values() for directory in directories]
    process = transformers5.start_logits(
        transformers_5, every, tmp_path / "ids", tmp_path / "logits"
    )
    found = {}
    for start in range(0, len(every), CHUNK):
        directories = every[start : start + CHUNK]
        (answers,) = ranks.run(outcomes, 1, directories=directories, ids=IDS)
        found |= dict(zip(directories, answers, strict=True))
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-2000:]
    of_5 = torch.load(tmp_path / "logits")
    wrong, accepted, reasons = [], Counter(), Counter()
    for directory, (ours, of_4) in found.items():
        problem = verdict(ours, [*of_4, of_5[str(directory)]])
        if problem is not None:
            config = (directory / "config.json").read_text()
            wrong.append(f"{directory.parent.name} {directory.name}: {problem}\n{config}")
        accepted[directory.parent.name] += not isinstance(ours, str)
        if isinstance(ours, str):
            reasons[ours[:60]] += 1
    if os.environ.get("UPCYCLE_FUZZ_SAY"):
        print(accepted, *reasons.most_common(), sep="\n")
    assert not wrong, f"{len(wrong)} of {len(found)} draws:\n" + "\n".join(wrong)
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

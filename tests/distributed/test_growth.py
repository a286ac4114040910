"""A larger MoE computes the trained one in transformers 5 too."""

import json
from pathlib import Path

import torch

from nemo_upcycle import Growth, grow_directory
from tests.distributed import transformers5
from tests.distributed.step0 import IDS, TOLERANCE
from tests.moe_models import MOES, write_moe


def test_transformers_5_computes_the_source(transformers_5: Path, tmp_path: Path) -> None:
    pairs = {}
    for number, kind in enumerate(MOES):
        source, large = tmp_path / f"{number}", tmp_path / f"{number}-large"
        grow_directory(write_moe(source, kind), large, Growth(8))
        pairs[str(source)] = str(large)
    torch.save(IDS, tmp_path / "ids")
    directories = json.dumps([*pairs, *pairs.values()])
    files = [str(tmp_path / name) for name in ("ids", "logits")]
    transformers5.end(
        transformers5.start(transformers_5, transformers5.LOGITS, directories, *files)
    )
    logits = torch.load(tmp_path / "logits")
    for source, large in pairs.items():
        assert (logits[source] - logits[large]).abs().max() <= TOLERANCE

"""NeMo trains on what the commands made of a blend's YAML."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemo_upcycle.cli import app
from tests.distributed.pool import RankPool
from tests.distributed.training import train
from tests.workspace import DOCUMENTS, make_workspace

BLEND = """
groups:
  web:
    weight: 7
    datasets:
      web:
        sources: [data/sources.jsonl]
  academic:
    weight: 3
    datasets:
      boolq:
        sources: [boolq.jsonl]
        template: |-
          {{passage}}
          Question: {{question}}?
          Answer: {{"yes" if answer else "no"}}
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    make_workspace(tmp_path)
    asked = [{"passage": f"{n} is {'even' if n % 2 == 0 else 'odd'}.", "question": f"is {n} even",
              "answer": n % 2 == 0} for n in range(4 * DOCUMENTS)]  # fmt: skip
    (tmp_path / "boolq.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    (tmp_path / "blend.yaml").write_text(BLEND)
    return tmp_path


def test_nemo_trains_on_a_blend(ranks: RankPool, workspace: Path) -> None:
    blend = str(workspace / "blend.yaml")
    words = ["data", "blend", blend, "--tokenizer", str(workspace / "tokenizer"), "--workers", "1"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    results = ranks.run(
        train,
        1,
        directory=workspace,
        options={"name": "blend", "max_steps": 2, "data_blend": blend},
        overrides={"log.ckpt": None, "trainer.limit_val_batches": 0},
    )
    errors = [result for result in results if isinstance(result, str)]
    assert not errors
    ((losses, _),) = results
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))

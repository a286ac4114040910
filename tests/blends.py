"""A blend of three datasets."""

import json
from pathlib import Path
from typing import Any

BLEND = """
directory: prepared
groups:
  web:
    weight: 7
    datasets:
      redpajama_v2:
        sources: [crawl]
        text_key: raw_content
        where: {bucket: head}
  academic:
    weight: 3
    datasets:
      boolq:
        weight: 2
        sources: [boolq.jsonl]
        template: |-
          {{passage}}
          Question: {{question}}?
          Answer: {{"yes" if answer else "no"}}
      openbookqa:
        sources: [openbookqa.jsonl]
        template: "{{question_stem}} {{choices.text[choices.label.index(answerKey)]}}"
"""


RECORDS: dict[str, list[dict[str, Any]]] = {
    "crawl/en.json": [
        {"raw_content": "kept", "bucket": "head"},
        {"raw_content": "not kept", "bucket": "tail"},
    ],
    "boolq.jsonl": [{"passage": "P", "question": "q", "answer": True}],
    "openbookqa.jsonl": [
        {
            "question_stem": "The sun is a",
            "choices": {"text": ["moon", "star"], "label": ["A", "B"]},
            "answerKey": "B",
        }
    ],
}


def write_blend(directory: Path) -> Path:
    """Write a blend of three datasets and their documents; return its YAML."""
    for name, records in RECORDS.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (directory / "blend.yaml").write_text(BLEND)
    return directory / "blend.yaml"

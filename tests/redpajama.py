"""RedPajama-V2 as its server lays it out, with tiny documents."""

import gzip
import json
from pathlib import Path
from typing import Any

from nemo_upcycle.data.redpajama import LOST

SNAPSHOTS, SHARDS = ("2014-52", "2023-06"), (0, 1, 2811)
HEADS = ["2014-52/0000", "2014-52/0001", "2023-06/0000", "2023-06/0001", "2023-06/2811"]


def record(text: str, bucket: str) -> dict[str, Any]:
    """Return a document with the fields that the data set has."""
    return {
        "url": "http://example.org/page",
        "date_download": "2023-01-26T21:25:04Z",
        "digest": "sha1:YXO4ZXXMWHWZNOYRLVEC7D4V3VFAKWXQ",
        "length": len(text),
        "nlines": 1,
        "source_domain": "example.org",
        "title": "A page",
        "raw_content": text,
        "cc_segment": "crawl-data/CC-MAIN-2023-06/segments/1/wet/CC-MAIN-1-00000.warc.wet.gz",
        "original_nlines": 3,
        "original_length": 2 * len(text),
        "line_ids": [1],
        "language": "en",
        "language_score": 0.97,
        "perplexity": 211.4,
        "bucket": bucket,
    }


def text_of(name: str) -> str:
    return f"Document of {name}."


def write_data_set(root: Path) -> Path:
    """Write two snapshots of three shards, listed as on the server; one file is lost there."""
    for snapshot in SNAPSHOTS:
        names = [f"{snapshot}/{shard:04}/en_{bucket}"
                 for shard in SHARDS for bucket in ("head", "middle")]  # fmt: skip
        for name in names:
            if name in LOST:
                continue
            file = root / "documents" / f"{name}.json.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            bucket = name.partition("_")[2]
            # The second should not be there: the file's name says otherwise.
            records = [record(text_of(name), bucket), record("strayed", "tail")]
            lines = "".join(json.dumps(each) + "\n" for each in records)
            file.write_bytes(gzip.compress(lines.encode()))
        (root / "listings").mkdir(exist_ok=True)
        listing = root / "listings" / f"en-{snapshot}-head_middle.txt"
        listing.write_text("".join(f"{name}\n" for name in names))
    return root

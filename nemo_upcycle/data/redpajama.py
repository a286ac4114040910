"""RedPajama-V2 (arXiv 2411.12372): find the files of a selection.

The hub's repository has a loading script instead of data. The script is not run here; the files are
read directly: `documents/SNAPSHOT/SHARD/LANGUAGE_BUCKET.json.gz`. The names are listed in
`listings/LANGUAGE-SNAPSHOT-PARTITION.txt`, one name without suffix per line. Buckets are CCNet's
(arXiv 1911.00359): `head` is the third with the lowest perplexity under a model of Wikipedia.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from nemo_upcycle.data.remote import is_url, read_text
from nemo_upcycle.errors import UpcyclingError, listing

SCHEME = "redpajama-v2://"
TOGETHER = "https://data.together.xyz/redpajama-data-v2/v1.0.0"
LANGUAGES = ("en", "de", "fr", "es", "it")
PARTITIONS = {"head": "head_middle", "middle": "head_middle", "tail": "tail"}
ENDING = ".json.gz"

LOST = frozenset(
    {
        "2014-52/2811/en_head",
        "2014-52/3215/en_middle",
        "2014-52/4251/en_head",
        "2015-40/0914/it_head",
        "2015-40/0964/it_head",
        "2015-40/1315/it_head",
        "2015-40/2650/it_head",
        "2017-04/4965/it_middle",
    }
)
"""Files that are listed but missing; `urls/missing-documents.txt` in the hub's repository."""


@dataclass(frozen=True)
class Excerpt:
    """A part of the data set.

    Attributes:
        base: URL or local directory, both with the same layout.
        snapshots: Common Crawl snapshots, such as 2023-06.
        language: A member of `LANGUAGES`.
        bucket: A key of `PARTITIONS`.
        shards: Shard numbers, out of 5,000 shards; None selects all existing shards.
    """

    base: str
    snapshots: tuple[str, ...]
    language: str = "en"
    bucket: str = "head"
    shards: range | None = None

    def files(self) -> list[str]:
        """Return the paths or URLs of the files, snapshot by snapshot.

        Raises:
            UpcyclingError: A snapshot or shard is missing or cannot be reached.
        """
        return [
            f"{self.base}/documents/{name}{ENDING}"
            for snapshot in self.snapshots
            for name in self._of_snapshot(snapshot)
        ]

    def _of_snapshot(self, snapshot: str) -> list[str]:
        there = self._listed(snapshot) if is_url(self.base) else self._found(snapshot)
        if self.shards is not None:
            wanted = {f"{snapshot}/{shard:04}/{self._file}" for shard in self.shards} - LOST
            if absent := sorted(wanted - set(there)):
                raise UpcyclingError(
                    f"{self.base}: {len(absent)} of {len(wanted)} shards are not there: "
                    f"{listing(absent, 3)}. Download them, or give other shards."
                )
            there = [name for name in there if name in wanted]
        if not there:
            raise UpcyclingError(f"{self.base}: no documents/{snapshot}/*/{self._file}{ENDING}.")
        return there

    @property
    def _file(self) -> str:
        return f"{self.language}_{self.bucket}"

    def _listed(self, snapshot: str) -> list[str]:
        partition = f"{self.language}-{snapshot}-{PARTITIONS[self.bucket]}"
        listed = read_text(f"{self.base}/listings/{partition}.txt").split()
        return sorted({name for name in listed if name.endswith(f"/{self._file}")} - LOST)

    def _found(self, snapshot: str) -> list[str]:
        files = Path(self.base, "documents", snapshot).glob(f"*/{self._file}{ENDING}")
        return sorted(f"{snapshot}/{path.parent.name}/{self._file}" for path in files)


def excerpt(source: str) -> Excerpt:
    """Parse `redpajama-v2://[BASE]?snapshots=2023-06,…[&language=en][&bucket=head][&shards=0-99]`.

    Raises:
        UpcyclingError: The source does not follow this syntax.
    """
    base, _, query = source.removeprefix(SCHEME).partition("?")
    options = dict(parse_qsl(query))
    unknown = set(options) - {"snapshots", "language", "bucket", "shards"}
    snapshots = tuple(options.get("snapshots", "").split(","))
    language, bucket = options.get("language", "en"), options.get("bucket", "head")
    if (
        unknown
        or not all(re.fullmatch(r"\d{4}-\d{2}", snapshot) for snapshot in snapshots)
        or language not in LANGUAGES
        or bucket not in PARTITIONS
    ):
        raise UpcyclingError(
            f"{source}: expected {SCHEME}[BASE]?snapshots=2023-06,2022-49, and &language= one of "
            f"{', '.join(LANGUAGES)}, &bucket= one of {', '.join(PARTITIONS)}, &shards=0-99 or 7."
        )
    shards = _range(source, options["shards"]) if "shards" in options else None
    return Excerpt(base.rstrip("/") or TOGETHER, snapshots, language, bucket, shards)


def _range(source: str, text: str) -> range:
    matched = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text)
    first, last = (int(matched[1]), int(matched[2] or matched[1])) if matched else (1, 0)
    if first > last:
        raise UpcyclingError(f"{source}: shards={text}: expected a number, or two: 0-99.")
    return range(first, last + 1)

"""An interrupted preparation goes on, and the files are the same."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.data import parts
from nemo_upcycle.data.manifest import check_files, read_manifest
from nemo_upcycle.data.preparation import Preparation, prepare
from nemo_upcycle.errors import UpcyclingError
from tests import progress
from tests.corpora import (
    TEXTS,
    contents,
    documents_in,
    expected_documents,
    many,
    prepared,
    write,
)
from tests.thorough import thorough


def test_progress_ends_at_the_size_and_the_tokens(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "BATCH_CHARACTERS", 30)
    source = write(tmp_path / "a.jsonl", TEXTS * 3)
    calls: list[tuple[int, int, int]] = []
    preparation = Preparation((str(source),), tokenizer, tmp_path / "data")
    manifest = prepare(preparation, 1, lambda *call: calls.append(call))
    size = source.stat().st_size
    assert len(calls) > 3
    assert calls == sorted(set(calls))
    assert calls[-1] == (size, size, manifest.tokens)


def test_what_is_done_is_not_done_again(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", TEXTS)
    first = prepared(source, tokenizer, tmp_path / "data")
    monkeypatch.setattr("nemo_upcycle.data.preparation.tokenize_part", None)
    again = prepared(source, tokenizer, tmp_path / "data")
    assert again == first == read_manifest(tmp_path / "data")


def test_other_input_replaces(tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ["one text"])
    prepared(source, tokenizer, tmp_path / "data")
    write(source, ["two text"])  # as long
    os.utime(source, ns=(1, 1))
    prepared(source, tokenizer, tmp_path / "data")
    assert documents_in(tmp_path / "data") == expected_documents(tokenizer, ["two text"])


def test_complete_parts_are_kept_after_a_failure(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", many(100))
    made: list[int] = []
    real = parts.tokenize_part

    def fail_at_third(part: Any, files: Any, *rest: Any) -> Any:
        if len(made) == 2:
            raise UpcyclingError("no more")
        made.append(files.number)
        return real(part, files, *rest)

    monkeypatch.setattr("nemo_upcycle.data.preparation.tokenize_part", fail_at_third)
    with pytest.raises(UpcyclingError, match="no more"):
        prepared(source, tokenizer, tmp_path / "data", part_bytes=5_000)
    assert made == [0, 1]
    assert not (tmp_path / "data.idx").exists()

    def go_on(part: Any, files: Any, *rest: Any) -> Any:
        made.append(files.number)
        return real(part, files, *rest)

    monkeypatch.setattr("nemo_upcycle.data.preparation.tokenize_part", go_on)
    prepared(source, tokenizer, tmp_path / "data", part_bytes=5_000)
    assert made == sorted(set(made))
    assert documents_in(tmp_path / "data") == expected_documents(tokenizer, many(100))


def leave_parts(tokenizer: Path, source: Path, prefix: Path) -> Path:
    """Prepare, and put the parts back as a kill just before the end would leave them."""
    import shutil

    kept = prefix.with_name("kept")
    real = shutil.rmtree
    try:
        shutil.rmtree = lambda path, **_: os.replace(path, kept)  # type: ignore[assignment]
        prepared(source, tokenizer, prefix, part_bytes=5_000)
    finally:
        shutil.rmtree = real
    for path in prefix.parent.glob(f"{prefix.name}.*"):
        path.unlink()
    work = prefix.with_name(f".{prefix.name}.parts")
    os.replace(kept, work)
    return work


def test_a_damaged_part_is_noticed_and_made_anew(tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", many(100))
    work = leave_parts(tokenizer, source, tmp_path / "data")
    damaged = work / "000001.bin"
    damaged.write_bytes(b"\0" + damaged.read_bytes()[1:])
    with pytest.raises(UpcyclingError, match=r"000001\.bin is not what was written"):
        prepared(source, tokenizer, tmp_path / "data", part_bytes=5_000)
    prepared(source, tokenizer, tmp_path / "data", part_bytes=5_000)
    assert documents_in(tmp_path / "data") == expected_documents(tokenizer, many(100))


def test_parts_of_another_job_are_left_alone(tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", many(100))
    work = leave_parts(tokenizer, source, tmp_path / "data")
    before = contents(work)
    with pytest.raises(UpcyclingError, match="holds parts of another job"):
        prepared(source, tokenizer, tmp_path / "data", part_bytes=4_000)
    assert contents(work) == before


@pytest.mark.parametrize("said", [None, "", '{"format": 1, "sour'])
def test_parts_of_nobody_knows_what_are_not_taken(
    tokenizer: Path, tmp_path: Path, said: str | None
) -> None:
    """A kill leaves such parts while parts are removed, or before their source is named."""
    source = write(tmp_path / "a.jsonl", many(100))
    work = leave_parts(tokenizer, source, tmp_path / "data")
    (work / "job.json").unlink()
    if said is not None:
        (work / "job.json").write_text(said)
    other = write(tmp_path / "b.jsonl", many(100, seed=1))
    prepared(other, tokenizer, tmp_path / "data", part_bytes=5_000)
    assert documents_in(tmp_path / "data") == expected_documents(tokenizer, many(100, seed=1))


def test_two_at_once_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    import fcntl

    source = write(tmp_path / "a.jsonl", many(100))
    work = leave_parts(tokenizer, source, tmp_path / "data")
    with (work / "job.json").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UpcyclingError, match="Another process is at work"):
            prepared(source, tokenizer, tmp_path / "data", part_bytes=5_000)


def test_checksums(tokenizer: Path, tmp_path: Path) -> None:
    manifest = prepared(write(tmp_path / "a.jsonl", TEXTS), tokenizer, tmp_path / "data")
    for name, each in manifest.files.items():
        content = (tmp_path / name).read_bytes()
        assert each == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert check_files(tmp_path / "data") == manifest
    tokens = (tmp_path / "data.bin").read_bytes()
    (tmp_path / "data.bin").write_bytes(b"\1" + tokens[1:])
    with pytest.raises(UpcyclingError, match=r"data\.bin: its sha256 is not the manifest's"):
        check_files(tmp_path / "data")
    (tmp_path / "data.bin").write_bytes(tokens[1:])
    with pytest.raises(UpcyclingError, match="no complete dataset"):
        check_files(tmp_path / "data")


SCRIPT = """
import sys
from pathlib import Path
from nemo_upcycle.data.preparation import Preparation, prepare
source, tokenizer, prefix = sys.argv[1:]
if __name__ == "__main__":
    print("begun", flush=True)
    prepare(Preparation((source,), Path(tokenizer), Path(prefix), part_bytes=40_000), workers=2)
    print("done", flush=True)
"""


@pytest.mark.slow
def test_killed_at_ten_moments_the_files_are_the_same(tokenizer: Path, tmp_path: Path) -> None:
    """SIGKILL for it and its processes; each time the same command goes on."""
    source = write(tmp_path / "a.jsonl", many(8_000))
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    calm, wild = (tmp_path / name / "data" for name in ("calm", "wild"))

    def start(prefix: Path) -> subprocess.Popen[str]:
        words = [sys.executable, str(script), str(source), str(tokenizer), str(prefix)]
        return subprocess.Popen(words, start_new_session=True, stdout=subprocess.PIPE, text=True)

    started = time.monotonic()
    assert start(calm).communicate()[0].endswith("done\n")
    whole = time.monotonic() - started
    rng, kills = random.Random(7), 0
    for _ in range(10):
        process = start(wild)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0.05, 0.7) * whole)
        if process.poll() is None:
            kills += 1
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert start(wild).communicate()[0].endswith("done\n")
    assert kills >= 5
    assert contents(wild.parent) == contents(calm.parent)
    assert len(list(wild.parent.iterdir())) == 3


FULL = """
import resource, signal, sys
from pathlib import Path
from nemo_upcycle.data.preparation import Preparation, prepare
from nemo_upcycle.errors import UpcyclingError
source, tokenizer, prefix, part_bytes = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try:
    prepare(Preparation((source,), Path(tokenizer), Path(prefix), part_bytes=int(part_bytes)))
except UpcyclingError as error:
    print(error)
"""


@pytest.mark.parametrize(("part_bytes", "kept"), [thorough((10**9, False)), (10_000, True)])
def test_a_full_disk_keeps_complete_parts_alone(
    tokenizer: Path, tmp_path: Path, part_bytes: int, kept: bool
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": f"{n} expert " * 20}) + "\n" for n in range(300)))
    prefix = tmp_path / "out" / "data"
    words = [sys.executable, "-c", FULL, str(source), str(tokenizer), str(prefix), str(part_bytes)]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "File too large" in said
    assert "the same command goes on" in said
    names = {path.name for path in tmp_path.glob("out/.data.parts/*")}
    assert ("000000.json" in names) == kept
    assert not [name for name in names if name.startswith("new") or name.endswith(".partial")]
    assert prefix.parent.exists() == kept
    prepare(Preparation((str(source),), tokenizer, prefix, part_bytes=part_bytes))
    assert len(list(prefix.parent.iterdir())) == 3


def begun(tokenizer: Path, tmp_path: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """Start the command with two processes and return it once the first has begun."""
    source = tmp_path / "a.jsonl"
    source.write_text((json.dumps({"text": "expert dense " * 300}) + "\n") * 10_000)
    words = ["data", "tokenize", str(source), "--workers", "2"]
    words += ["--tokenizer", str(tokenizer), "--out", str(tmp_path / "out")]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "nemo_upcycle.cli", *words],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    while not list(tmp_path.glob("out/.a.parts/*.partial")):
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    return process, log


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_with_one_line(tokenizer: Path, tmp_path: Path) -> None:
    process, log = begun(tokenizer, tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    assert progress.exit_code(process) == 130
    assert log.read_text().splitlines()[-1] == "Error: interrupted."
    assert "Traceback" not in log.read_text()
    assert not list(tmp_path.glob("out/.a.parts/*.partial"))


@pytest.mark.slow
def test_a_process_that_is_killed_is_one_line(tokenizer: Path, tmp_path: Path) -> None:
    """As the kernel does where memory is short."""
    process, log = begun(tokenizer, tmp_path)
    partial = next(tmp_path.glob("out/.a.parts/*.partial"))
    os.kill(int(partial.name.split(".")[1]), signal.SIGKILL)
    assert progress.exit_code(process) == 1
    said = " ".join(log.read_text().split())
    assert "A process that tokenizes was killed" in said
    assert "Traceback" not in said

"""Compare `nemo-upcycle upcycle` with mergekit-moe: seconds and peak memory, on one dense model.

Both make an E8T2 of the same random Llama in bf16, in turn, each time in a fresh process. Before
each run the dense model is in the page cache, and earlier output is on disk and removed. Seconds
are those of the whole command, imports included; memory is the peak of its resident memory, which
includes mapped files.

mergekit needs another transformers than NeMo 2: install it in an environment of its own.

Usage: python -m benchmarks.upcycle_directory --mergekit ENV/bin/mergekit-moe
           [--layers 16] [--hidden-size 2048] [--runs 3] [--dir DIR]
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.export import GIB, MIB, write_tokenizer

POLL_S = 0.05


class Sample(NamedTuple):
    """Figures of a command: seconds; peak resident memory, and that of it in no file, in bytes."""

    seconds: float
    peak: int
    peak_anonymous: int


def build(directory: Path, layers: int, hidden_size: int) -> None:
    """Write a random dense Llama in bf16, with a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 256,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(directory)
    write_tokenizer(directory)


def commands(dense: Path, out: Path, mergekit: Path | None) -> dict[str, list[str]]:
    """Return the command of each method; writes mergekit's recipe."""
    ours = [sys.executable, "-m", "nemo_upcycle.cli", "upcycle", str(dense), str(out)]
    found = {"nemo-upcycle upcycle": ours}
    if mergekit is not None:
        expert = f'  - source_model: {dense}\n    positive_prompts: [""]\n'
        recipe = dense.parent / "mergekit.yaml"
        recipe.write_text(
            f"base_model: {dense}\ngate_mode: random\ndtype: bfloat16\nexperts_per_token: 2\n"
            f"experts:\n{expert * 8}"
        )
        found["mergekit-moe"] = [str(mergekit), str(recipe), str(out)]
    return found


def measure(command: list[str], dense: Path, out: Path) -> Sample:
    """Run a command once."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    for file in dense.glob("*.safetensors"):
        with file.open("rb") as opened:
            while opened.read(16 * MIB):
                pass
    started = time.perf_counter()
    peak = anonymous = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None:
            status = _status(running.pid)
            peak = max(peak, status.get("VmHWM", 0))
            anonymous = max(anonymous, status.get("RssAnon", 0))
            time.sleep(POLL_S)
    if running.returncode:
        raise SystemExit(f"{' '.join(command)} failed; run it by hand.")
    return Sample(time.perf_counter() - started, peak, anonymous)


def _status(pid: int) -> dict[str, int]:
    """Return the memory of a process, in bytes by Linux's names; empty once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith("kB"))
    return {name: 1024 * int(value.split()[0]) for name, value in pairs}


def main() -> None:
    """Run every method in turn, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", type=Path, help="mergekit-moe of another environment")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dir", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as temporary:
        dense, out = Path(temporary) / "dense", Path(temporary) / "moe"
        build(dense, arguments.layers, arguments.hidden_size)
        samples: dict[str, list[Sample]] = {}
        for _ in range(arguments.runs):
            for name, command in commands(dense, out, arguments.mergekit).items():
                samples.setdefault(name, []).append(measure(command, dense, out))
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"{size / GIB:.1f} GiB written, {arguments.runs} runs, medians\n")
    print("| | seconds | peak memory | of it in no file |\n|---|---|---|---|")
    for name, runs in samples.items():
        seconds, peak, anonymous = (statistics.median(values) for values in zip(*runs, strict=True))
        print(f"| {name} | {seconds:.0f} | {peak / MIB:,.0f} MiB | {anonymous / MIB:,.0f} MiB |")


if __name__ == "__main__":
    main()

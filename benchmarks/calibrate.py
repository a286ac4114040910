"""Time and peak memory of `nemo-upcycle calibrate` on a random Llama with the layers of Llama 3 8B.

Memory is that of all processes together: resident pages that are in no file, sampled, and the
largest sum. The weights' files are in the page cache if they fit.

Usage: python -m benchmarks.calibrate [--layers 32] [--tokens 2048] [--processes 2] [--dir DIR]
           [--second-moment diagonal] [--vocabulary 128256]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.export import GIB
from nemo_upcycle.data.tokenizer import train_tokenizer

POLL_S = 0.2


def build(directory: Path, layers: int, vocabulary: int) -> None:
    """Write a random Llama in bf16 with the layers of Llama 3 8B."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(directory)


def write_text(file: Path) -> None:
    """Write sources of Python's standard library as text."""
    files = sorted(Path(json.__file__).parent.glob("*.py"))
    file.write_text("".join(json.dumps({"text": each.read_text()}) + "\n" for each in files))


def measure(command: list[str]) -> tuple[float, int]:
    """Run a command; return seconds, and the largest memory of its processes together in bytes."""
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(command) as running:
        while running.poll() is None:
            peak = max(peak, _memory(running.pid))
            time.sleep(POLL_S)
    if running.returncode:
        raise SystemExit(f"{' '.join(command)} failed.")
    return time.perf_counter() - started, peak


def _memory(pid: int) -> int:
    """Return the resident memory in no file of a process and of the processes it has started."""
    try:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = sum(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))
    return own + sum(_memory(int(child)) for child in children)


def main() -> None:
    """Calibrate once, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--second-moment", default="diagonal")
    parser.add_argument("--dir", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as temporary:
        dense, text, out = (
            Path(temporary) / name for name in ("dense", "text.jsonl", "statistics")
        )
        subprocess.run(
            [
                *(sys.executable, "-c"),
                "import sys; from pathlib import Path; from benchmarks.calibrate import build; "
                "build(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))",
                *(str(dense), str(arguments.layers), str(arguments.vocabulary)),
            ],
            check=True,
        )
        write_text(text)
        tokenizer = Path(temporary) / "tokenizer"
        train_tokenizer([text], tokenizer, 512)
        command = [
            *(sys.executable, "-m", "nemo_upcycle.cli", "calibrate", str(dense)),
            *("--text", str(text), "--tokenizer", str(tokenizer), "--out", str(out)),
            *("--tokens", str(arguments.tokens)),
            *("--sequence-length", str(arguments.sequence_length)),
            *("--processes", str(arguments.processes)),
            *("--second-moment", arguments.second_moment),
        ]
        seconds, peak = measure(command)
        size = out.stat().st_size
    print(
        f"{arguments.layers} layers, {arguments.tokens} tokens, {arguments.processes} processes, "
        f"second moment {arguments.second_moment}: {seconds:.0f} s, {peak / GIB:.2f} GiB in all, "
        f"statistics of {size / GIB:.3f} GiB"
    )


if __name__ == "__main__":
    main()

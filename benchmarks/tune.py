"""Measure the processor time of `nemo-upcycle tune`: whole commands, imports included.

Usage: python -m benchmarks.tune [RUNS]
"""

import resource
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

COMMANDS = {
    "default, 128 GPUs": ["--gpus", "128"],
    "granularity 8, 128 GPUs": ["--gpus", "128", "--granularity", "8"],
    "--scaling, 8 to 4,096 GPUs": ["--gpus", "128", "--scaling", "scaling.png"],
}


def seconds(options: list[str], directory: str) -> float:
    """Return a command's seconds of user and system time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    tune = [sys.executable, "-m", "nemo_upcycle.cli", "tune", *options]
    subprocess.run(tune, check=True, capture_output=True, cwd=directory)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print a table as Markdown."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print("| command | median, s | all |\n|---|---|---|")
    with TemporaryDirectory() as directory:
        for name, options in COMMANDS.items():
            times = sorted(seconds(options, str(Path(directory))) for _ in range(runs))
            every = ", ".join(f"{time:.2f}" for time in times)
            print(f"| {name} | {statistics.median(times):.2f} | {every} |")


if __name__ == "__main__":
    main()

"""Measure the cost of installing and starting this package: size, imports, first answers.

Usage: python benchmarks/startup.py [RUNS]
"""

import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

BIN = Path(sys.executable).parent
COMMANDS = {
    "import nemo_run, nemo.collections.llm": [
        sys.executable,
        "-c",
        "import nemo_run; from nemo.collections import llm; llm.pretrain",
    ],
    "nemo upcycle --help": [str(BIN / "nemo"), "upcycle", "--help"],
    "nemo-upcycle --help": [str(BIN / "nemo-upcycle"), "--help"],
}


def seconds(command: list[str]) -> float:
    """Return a command's wall time in seconds."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    packages = Path(sysconfig.get_paths()["purelib"])
    size = sum(file.stat().st_size for file in packages.rglob("*") if file.is_file())
    print(f"site-packages: {size / 2**30:.2f} GiB")
    for name, command in COMMANDS.items():
        seconds(command)
        times = [seconds(command) for _ in range(runs)]
        print(
            f"{name}: median {statistics.median(times):.2f} s "
            f"({min(times):.2f} to {max(times):.2f}, {runs} runs)"
        )


if __name__ == "__main__":
    main()

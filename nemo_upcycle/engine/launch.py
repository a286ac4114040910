"""Run a `nemo-upcycle` command on several ranks of this machine, like torchrun."""

import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from math import lcm
from pathlib import Path

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.errors import listing

SECONDS_TO_END = 5
"""Time before SIGKILL after Ctrl-C; a rank that waits in a collective ignores other signals."""

_KILLED = re.compile(r"rank +: (\d+) .*\n +exitcode +: -9 ")


def killed(ranks: Sequence[int], advice: str = "") -> str:
    """Say that ranks were killed by SIGKILL, and why that is likely.

    Args:
        ranks: The ranks.
        advice: What is known of the memory that they need.
    """
    who = (
        f"rank {ranks[0]} was"
        if len(ranks) == 1
        else f"ranks {listing(list(map(str, ranks)))} were"
    )
    return (
        f"{who} killed by SIGKILL (exit code -9). Most likely the kernel did it because memory ran "
        f"out: `dmesg` says so, or the control group's memory.events. "
        f"{advice or 'Use fewer ranks, a smaller model or batch, or a machine with more memory.'}"
    )


def killed_ranks(log: str) -> list[int]:
    """Return the ranks that torchrun's report says were killed by SIGKILL."""
    return sorted({int(rank) for rank in _KILLED.findall(log)})


def fewest_ranks(folding: ParallelFolding) -> int:
    """Return the smallest number of ranks for a mapping."""
    attention = folding.tensor_model_parallel_size * folding.context_parallel_size
    experts = folding.expert_tensor_parallel_size * folding.expert_model_parallel_size
    return folding.pipeline_model_parallel_size * lcm(attention, experts)


def launched() -> bool:
    """Return whether a launcher has started this process as one of several ranks."""
    return "RANK" in os.environ


def is_first_rank() -> bool:
    """Return whether this process is rank 0, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def launch(arguments: list[str], ranks: int, errors: str) -> int:
    """Run `nemo-upcycle ARGUMENTS` on ranks of this machine; rank 0's output is shown.

    Args:
        arguments: The command and its arguments.
        ranks: Number of ranks.
        errors: Environment variable with the directory where ranks write their errors.

    Returns:
        An exit code. An error is printed once, in one line if all ranks report the same. For a
        failed rank other than 0 without a report, the end of its output is printed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # torchrun's loggers report the failure at length; the rank itself gives the reason.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory() as said:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            run_id="nemo-upcycle",
            max_restarts=0,
            monitor_interval=0.1,
            local_addr="127.0.0.1",
            logs_specs=DefaultLogsSpecs(
                log_dir=directory, redirects=dict.fromkeys(range(1, ranks), Std.ALL)
            ),
        )
        command = (sys.executable, "-m", "nemo_upcycle.cli", *arguments)
        os.environ[errors] = said
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_END))
        try:
            elastic_launch(config, command[0])(*command[1:])
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            left = (Path(said) / str(rank)).exists()
            _report_errors(Path(said))
            if failure.exitcode == -signal.SIGKILL:
                print(f"Error: {killed([rank])}", file=sys.stderr)
            if not left and rank != 0:
                _show_log(Path(directory), rank)
            return max(1, failure.exitcode)
        except SignalException as error:
            print("Error: interrupted.", file=sys.stderr)
            return 128 + error.sigval
    return 0


def _report_errors(directory: Path) -> None:
    """Print the errors that ranks have written, each once."""
    by_message: dict[str, list[str]] = {}
    for file in sorted(directory.iterdir(), key=lambda file: int(file.name)):
        by_message.setdefault(file.read_text(), []).append(file.name)
    for message, ranks in by_message.items():
        who = f"rank {','.join(ranks)}: " if len(by_message) > 1 else ""
        print(f"Error: {who}{message}", file=sys.stderr)


def _show_log(directory: Path, rank: int) -> None:
    for log in directory.glob(f"**/{rank}/stderr.log"):
        print(f"rank {rank}:", log.read_text(errors="replace")[-2000:], file=sys.stderr)

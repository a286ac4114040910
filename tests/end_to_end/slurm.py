"""A real Slurm of one node, of this machine's own programs, for as long as a test needs it.

Beside the node that runs jobs it knows 64 with 8 GPUs each that do not exist, for
`sbatch --test-only`.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import progress

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
ATTEMPTS = 60
UNKNOWN_JOB = "Invalid job id specified"
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmUser=root
SlurmdUser=root
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=60
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=cpu Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
GresTypes=gpu
NodeName=gpu[01-64] NodeAddr=127.0.1.[1-64] CPUs=128 Gres=gpu:8 State=DOWN
PartitionName=gpu Nodes=gpu[01-64] MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Return why Slurm cannot be started here; None: it can."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=_path())]
    if missing:
        return f"{missing[0]} is not installed (Debian: slurm-wlm, munge)"
    return None if os.geteuid() == 0 else "starting Slurm's daemons needs root"


def _path() -> str:
    return f"{os.environ['PATH']}{os.pathsep}/usr/sbin"


@contextmanager
def slurm(directory: Path) -> Iterator[dict[str, str]]:
    """Start munge and Slurm; yield the environment for its commands."""
    for name in ("state", "spool"):
        (directory / name).mkdir(parents=True)
    directory.chmod(0o755)
    ports = [_free_port(), _free_port()]
    config = directory / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    config.write_text(CONFIG.format(host=host, directory=directory, ports=ports))
    environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(config)}
    key = directory / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = [f"--{option}={directory}/munge.{end}" for option, end in files.items()]
    daemons = [
        ["munged", "--foreground", "--force", f"--key-file={key}", *munge],
        ["slurmctld", "-D", "-c", "-f", str(config)],
        ["slurmd", "-D", "-c", "-f", str(config), "-N", host],
    ]
    started = []
    try:
        for words in daemons:
            with open(directory / f"{words[0]}.out", "w") as out:
                started.append(
                    subprocess.Popen(words, env=environment, stdout=out, stderr=subprocess.STDOUT)
                )
            time.sleep(1)
        _wait_until_idle(environment, directory, [process.pid for process in started])
        yield environment
    finally:
        for process in reversed(started):
            process.terminate()
            progress.exit_code(process)


def _wait_until_idle(environment: dict[str, str], directory: Path, pids: list[int]) -> None:
    def is_idle() -> bool:
        return ask(environment, "sinfo", "-h", "-p", "cpu", "-o", "%t").strip() == "idle"

    if not progress.until(is_idle, pids, every_s=0.5):
        logs = "\n".join(path.read_text() for path in directory.glob("*.out"))
        raise AssertionError(f"Slurm did not start: {logs}")


def run(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands."""
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


def ask(environment: dict[str, str], *words: str) -> str:
    """Return what one of Slurm's commands answers.

    A busy controller lets commands wait in vain. The command is repeated then: an answer that did
    not come is no empty queue.
    """
    for _ in range(ATTEMPTS):
        result = run(environment, *words)
        if result.returncode == 0 or UNKNOWN_JOB in result.stderr:
            return result.stdout
        time.sleep(1)
    raise AssertionError(f"{' '.join(words)}: {result.stderr}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]

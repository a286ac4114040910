"""NeMo-Run executors: where a recipe runs."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Optional

import nemo_run as run
from nemo_run.config import get_nemorun_home

SECONDS_TO_SAVE = 300
"""Time before the limit at which a job is signalled to save and end."""

_PATIENCE = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SECONDS_TO_SAVE)}
"""torchrun kills ranks that are still alive this long after a signal; the default is 30 s."""

_current: ContextVar[Any] = ContextVar("executor", default=None)


@contextmanager
def launching(executor: Any) -> Iterator[None]:
    """Let factories know the executor of the command that is being parsed; None runs here."""
    token = _current.set(executor)
    try:
        yield
    finally:
        _current.reset(token)


def ranks() -> Optional[int]:
    """Return the ranks per node of the command that is being parsed, or of the launched job."""
    launched = os.environ.get("LOCAL_WORLD_SIZE")
    return int(launched) if launched else getattr(_current.get(), "ntasks_per_node", None)


def gpus() -> dict[str, int]:
    """Return the GPUs of the command's Slurm job, as arguments of a recipe; none if not on GPUs."""
    executor = _current.get()
    if not isinstance(executor, run.SlurmExecutor) or not executor.gpus_per_node:
        return {}
    return {"num_nodes": executor.nodes, "num_gpus_per_node": executor.ntasks_per_node}


@run.cli.factory
def cpu(ntasks_per_node: int = 1) -> run.Config[run.LocalExecutor]:
    """Run on this machine's CPU, one gloo rank per task.

    Args:
        ntasks_per_node: Ranks to start.

    Returns:
        The executor.

    Examples:
        CLI usage:
            $ nemo llm pretrain --factory llama_tiny_e8t2 \
                run.executor=cpu run.executor.ntasks_per_node=2

        Python API usage:
            >>> run.run(recipe, executor=cpu(ntasks_per_node=2))
    """
    _find_torchrun()
    return run.Config(
        run.LocalExecutor,
        ntasks_per_node=ntasks_per_node,
        launcher="torchrun",
        env_vars=dict(_PATIENCE),
    )


@run.cli.factory
def slurm(
    container_image: Optional[str] = None,
    container_mounts: str = "",
    account: Optional[str] = None,
    partition: Optional[str] = None,
    nodes: int = 1,
    ntasks_per_node: int = 8,
    gpus_per_node: Optional[int] = 8,
    time: str = "04:00:00",
    retries: int = 20,
) -> run.Config[run.SlurmExecutor]:
    """Run on Slurm in a container (Pyxis), one rank per GPU; a stopped run is requeued.

    Args:
        container_image: Image for `srun --container-image`. None takes `nemo-upcycle.sqsh` in the
            current directory, which `enroot import dockerd://nemo-upcycle` makes from the image
            that `Dockerfile` builds.
        container_mounts: HOST:CONTAINER pairs, separated by spaces.
        account: Slurm's account.
        partition: Slurm's partition.
        nodes: Number of nodes.
        ntasks_per_node: Ranks per node.
        gpus_per_node: GPUs per node.
        time: Time limit per start; 5 minutes before the limit the run saves and is requeued.
        retries: How often the run is requeued.

    Returns:
        The executor.

    Examples:
        CLI usage:
            $ nemo llm pretrain --factory llama3_8b_e8t2 \
                run.executor=slurm run.executor.nodes=64 \
                run.executor.container_image=/images/moe.sqsh \
                run.executor.container_mounts="['/shared:/shared']"
    """
    return _slurm(
        account=account,
        partition=partition,
        nodes=nodes,
        ntasks_per_node=ntasks_per_node,
        gpus_per_node=gpus_per_node,
        time=time,
        retries=retries,
        container_image=container_image or f"{Path.cwd()}/nemo-upcycle.sqsh",
        container_mounts=container_mounts.split(),
    )


@run.cli.factory
def slurm_bare(
    account: Optional[str] = None,
    partition: Optional[str] = None,
    nodes: int = 1,
    ntasks_per_node: int = 1,
    gpus_per_node: Optional[int] = None,
    time: str = "04:00:00",
    retries: int = 20,
) -> run.Config[run.SlurmExecutor]:
    """Run on Slurm in the current environment, without a container; a stopped run is requeued.

    Args:
        account: Slurm's account.
        partition: Slurm's partition.
        nodes: Number of nodes.
        ntasks_per_node: Ranks per node.
        gpus_per_node: GPUs per node; None on CPU.
        time: Time limit per start; 5 minutes before the limit the run saves and is requeued.
        retries: How often the run is requeued.

    Returns:
        The executor.

    Examples:
        CLI usage:
            $ nemo llm pretrain --factory "llama_tiny_e8t2(dir='/shared/demo')" \
                run.executor=slurm_bare run.executor.ntasks_per_node=2
    """
    _find_torchrun()
    return _slurm(
        account=account,
        partition=partition,
        nodes=nodes,
        ntasks_per_node=ntasks_per_node,
        gpus_per_node=gpus_per_node,
        time=time,
        retries=retries,
    )


def _slurm(**options: Any) -> run.Config[run.SlurmExecutor]:
    # With a local tunnel NeMo-Run looks for its jobs only there.
    experiments = f"{get_nemorun_home()}/experiments"
    return run.Config(
        run.SlurmExecutor,
        # The default contains the account, which not every cluster has.
        job_name_prefix="nemo-upcycle.",
        launcher="torchrun",
        packager=run.Config(run.Packager),
        tunnel=run.Config(run.LocalTunnel, job_dir=experiments),
        # The run saves and ends with 143; NeMo-Run's script then requeues the job.
        signal=f"TERM@{SECONDS_TO_SAVE}",
        env_vars=dict(_PATIENCE),
        # Slurm removes a job that waits for a failed job from the queue.
        additional_parameters={"requeue": True, "kill_on_invalid_dep": "yes"},
        **options,
    )


def _find_torchrun() -> None:
    """Put torchrun on PATH: NeMo-Run starts it by name, also without an activated environment."""
    if shutil.which("torchrun") is None:
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

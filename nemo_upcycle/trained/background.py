"""Export checkpoints of a run that goes on: one process at a time, which the run does not wait for.

A checkpoint is linked, file by file, before its export begins. The run may then remove the
checkpoint; the links keep the data until the export is complete, also beyond the run's end.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from nemo_upcycle.files import end_with

LINKED = ".linked"
"""Suffix of a directory of links to a checkpoint that is still to be exported."""

_OF_RANKS = (
    "RANK",
    "WORLD_SIZE",
    "MASTER_",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "TORCHELASTIC_",
    "SLURM_",
)
"""Beginnings of environment variables that would make the process think that it is a rank."""


class Exports:
    """Exports to `directory/NAME`, from checkpoints linked at `directory/NAME.linked`.

    Args:
        directory: Directory of all exports; made when the first begins.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._waiting: list[str] = []
        self._running: tuple[str, subprocess.Popen[bytes]] | None = None
        self._said: set[str] = set()

    def resume(self) -> None:
        """Continue with what an earlier process has linked and not exported."""
        for partial in self.directory.glob(f"*{LINKED}.partial"):
            shutil.rmtree(partial)
        linked = self.directory.glob(f"*{LINKED}")
        self._waiting += [path.name.removesuffix(LINKED) for path in sorted(linked)]

    def add(self, name: str, checkpoint: Path) -> None:
        """Link a complete checkpoint, to be exported as soon as the exports before are complete.

        An export of that name, which an earlier start of the run made, is replaced.
        """
        linked = self.directory / (name + LINKED)
        partial = linked.with_name(linked.name + ".partial")
        for outdated in (partial, linked, self.directory / name):
            if outdated.exists():
                shutil.rmtree(outdated)
        self.directory.mkdir(parents=True, exist_ok=True)
        shutil.copytree(checkpoint, partial, copy_function=_link)
        partial.rename(linked)
        self._waiting.append(name)

    def poll(self, wait: bool = False) -> list[str]:
        """Start the next export if none runs; return a remark for each that has ended.

        Args:
            wait: Whether to return only when none is left.
        """
        remarks = []
        while self._running or self._waiting:
            if self._running is None:
                self._running = self._start(self._waiting.pop(0))
            name, process = self._running
            if wait:
                process.wait()
            if process.poll() is None:
                break
            remarks += self._ended(name, process.returncode)
            self._running = None
        return remarks

    def _start(self, name: str) -> tuple[str, subprocess.Popen[bytes]]:
        # What a killed export has left.
        shutil.rmtree(self.directory / f"{name}.partial", ignore_errors=True)
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(_OF_RANKS)
        }
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        words = [
            str(os.getpid()),
            str(self.directory / (name + LINKED)),
            str(self.directory / name),
        ]
        with self._log(name).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C stops the run, which then ends this process
            )
        return name, process

    def _ended(self, name: str, code: int) -> list[str]:
        log = self._log(name)
        lines = log.read_text(errors="replace").splitlines()
        if code or not (self.directory / name).exists():
            cause = lines[-1].removeprefix("Error: ") if lines else f"exit code {code}"
            return [
                f"warning: {self.directory / name} could not be exported: {cause} See {log}. The "
                "run is not affected; its next start tries again."
            ]
        shutil.rmtree(self.directory / (name + LINKED))
        log.unlink()
        new = [
            line
            for line in lines
            if line.startswith((str(self.directory / name), "Note:")) and line not in self._said
        ]
        self._said.update(new)  # the notes of all exports are the same
        return new

    def _log(self, name: str) -> Path:
        return self.directory / f"{name}.log"


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system has links
        shutil.copy2(source, target)


def main() -> None:
    """Export in this process: PARENT, CHECKPOINT, DIRECTORY."""
    parent, checkpoint, directory = sys.argv[1:]
    end_with(int(parent))
    os.nice(19)
    from nemo_upcycle.errors import UpcyclingError
    from nemo_upcycle.trained.export import export

    try:
        plan = export(checkpoint, Path(directory))
    except UpcyclingError as error:
        sys.exit(f"Error: {error}")
    print(f"{directory}: {plan.family.class_name}, {len(plan.outputs)} tensors")
    for note in plan.notes:
        print(f"Note: {note}.")


if __name__ == "__main__":
    main()

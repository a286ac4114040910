"""transformers 5, which cannot be in the environment of the stack, in a directory of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENT = "transformers>=5,<6"
LOGITS = """
import json, sys, torch, transformers
assert transformers.__version__ >= "5", transformers.__version__
torch.set_num_threads(1)
directories, ids, out = json.loads(sys.argv[1]), torch.load(sys.argv[2]), {}
for directory in directories:
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        with torch.no_grad():
            out[directory] = model.eval()(ids).logits
    except Exception as error:
        out[directory] = f"{type(error).__name__}: {error}"
torch.save(out, sys.argv[3])
"""


def install() -> Path | None:
    """Return the directory that has transformers 5, or None where it cannot be installed.

    The directory is in the virtual environment, for the same Python and as long: the next run of
    the tests finds it there, and nothing is left of it once the environment is removed.
    """
    target = Path(sys.prefix, "transformers5")
    if target.is_dir():
        return target
    partial = target.with_name(f"transformers5.{os.getpid()}")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(partial)]
    if subprocess.run([*pip, REQUIREMENT], capture_output=True, timeout=600).returncode:
        shutil.rmtree(partial, ignore_errors=True)
        return None
    try:
        partial.rename(target)
    except OSError:  # another run of the tests was faster
        shutil.rmtree(partial)
    return target


def start(target: Path, script: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a script in a process that has transformers 5."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | {"PYTHONPATH": str(target)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_logits(
    target: Path, directories: list[Path], ids: Path, out: Path
) -> subprocess.Popen[str]:
    """Start a process that computes logits of each directory, or says why it does not."""
    return start(target, LOGITS, json.dumps([str(d) for d in directories]), str(ids), str(out))

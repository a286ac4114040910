"""What one GPU does with an upcycled model, beside what the planner says of it.

On one rank, with Transformer Engine's layers, in parts:

- exactness: the largest difference of the dense and the upcycled model's logits at step 0;
- layers: some layers of Llama 3 8B as E8T2, trained with Megatron's DDP and distributed optimizer:
  step time, model-FLOPs utilization and memory, for each capacity factor, recompute and kind of
  experts;
- kernels: what a step's time goes to;
- filling: how fast a dense checkpoint becomes experts on the GPU;
- recipe: where a step of `smollm2_135m_e8t2` in NeMo goes: kernels, host, waits, allocator, data;
  as it is, then with experts padded to a capacity, then with CUDA graphs on top.

With 15 minutes of a GPU, call in this order, each with `--out FILE`; the times are estimates:

1. `pytest -m gpu tests/distributed/test_gpu.py`: 3 minutes. Nothing below counts if this fails.
2. `python -m benchmarks.gpu --parts recipe`: 4 minutes. What costs the 25 ms per layer?
3. `python -m benchmarks.gpu_recipe micro_batch_size=32`, or what 2 suggests: 1 minute each.
4. `python -m benchmarks.gpu --parts layers kernels`: 4 minutes. Nothing may have become slower.

`nemo-upcycle ablate --recipe smollm2_135m_e8t2 --minutes 12 …` is for another 15 minutes; prepare
its text beforehand, on a CPU.

Weights are random, and so are the tokens: routing is about even. Without a GPU the parts run on
the CPU, to be tested; their numbers mean nothing there.

Usage: python -m benchmarks.gpu [--parts exactness layers kernels filling recipe] [--out FILE]
[--small]
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_training import (
    CASES,
    E8T2,
    EXPERTS,
    ON_GPU,
    Case,
    Training,
    build,
    free,
    inputs,
    measure,
    start,
)
from nemo_upcycle.checkpoint import HuggingFaceCheckpoint
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.engine import load
from nemo_upcycle.engine.load import LoadReport
from nemo_upcycle.families import Architecture, family_of
from nemo_upcycle.planner.flops import utilization
from nemo_upcycle.planner.hardware import hardware
from nemo_upcycle.planner.layer_time import StepTime
from nemo_upcycle.planner.memory import memory
from nemo_upcycle.planner.step_time import step_time
from tests.tiny import tokens, write_llama

GIB = 2**30
CHIP = "h200" if ON_GPU and "H200" in torch.cuda.get_device_name() else "h100"
DENSE = UpcyclingConfig(num_moe_experts=None)
Lines = Iterator[str]

# --- Exactness -------------------------------------------------------------------------------

SIZES: dict[str, dict[str, Any]] = {
    "hidden 64, 4 layers": {},
    "hidden 1024, 8 layers": {
        "vocab_size": 4096,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "initializer_range": 0.03,
    },
}


def exactness(small: bool) -> Lines:
    """Compare logits of the dense and the upcycled model, filled from the same checkpoint."""
    yield "Largest difference of logits; `of the largest` is that over the largest dense logit."
    yield ""
    yield "| model | precision | experts | MoE − dense | of the largest | dense − transformers |"
    yield "|---|---|---|---|---|---|"
    for name, size in list(SIZES.items())[: 1 if small else None]:
        with tempfile.TemporaryDirectory() as directory:
            dense = write_llama(Path(directory), **size)
            ids = tokens(2, 128, size.get("vocab_size", 256))
            expected = huggingface_logits(dense, ids)
            for dtype in (torch.float32, torch.bfloat16):
                control = filled_logits(dense, DENSE, dtype, ids)
                apart, largest = (control - expected).abs().max(), control.abs().max()
                for kind, overrides in EXPERTS.items():
                    found = filled_logits(dense, E8T2, dtype, ids, **overrides)
                    error = (found - control).abs().max()
                    yield (
                        f"| {name} | {str(dtype).removeprefix('torch.')} | {kind} | {error:.2g} | "
                        f"{error / largest:.1g} | {apart:.2g} |"
                    )


@torch.no_grad()
def huggingface_logits(dense: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).cuda()
    return model(ids.cuda()).logits


@torch.no_grad()
def filled_logits(
    dense: Path, upcycling: UpcyclingConfig, dtype: torch.dtype, ids: torch.Tensor, **overrides: Any
) -> torch.Tensor:
    """Upcycle and return fp32 logits, [rows, length, vocabulary]."""
    return filled(dense, upcycling, dtype, **overrides)(**inputs(ids)).float()


def filled(
    dense: Path, upcycling: UpcyclingConfig, dtype: torch.dtype, **overrides: Any
) -> torch.nn.Module:
    """Build a model and fill it from a dense checkpoint."""
    checkpoint = HuggingFaceCheckpoint(dense)
    arch = checkpoint.architecture
    model = build(arch, upcycling, dtype, **overrides).eval()
    load.fill([model], checkpoint, upcycling)
    return model


def layers(small: bool) -> Lines:
    """Measure all cases and compare with the planner's predictions."""
    chip = hardware(CHIP)
    yield "Bytes in GiB. `kept` is what a layer keeps for its backward pass; `peak` is what a step"
    yield "takes above parameters, gradients and optimizer. `×` is measured over planned."
    yield ""
    yield "".join(f"| {head} " for head in HEADS) + "|"
    yield "|---" * len(HEADS) + "|"
    for case in CASES[: 2 if small else None]:
        try:
            found = measure(case, small)
        except torch.cuda.OutOfMemoryError:
            yield f"| {case} | out of memory |"
            continue
        finally:
            free()
        workload = case.workload(small)
        planned = step_time(workload, case.mapping, chip).total
        used = utilization(workload.flops, 1, found.seconds, 1, chip.peak_tflops)
        said = memory(workload, case.mapping)
        state = said.parameters + said.gradients + said.optimizer
        cells = [
            f"{found.seconds * 1e3:.0f} ± {found.spread * 1e3:.0f}",
            f"{used['tflops_per_gpu']:.0f}",
            f"{used['mfu']:.1%}",
            f"{planned * 1e3:.0f}",
            f"{found.seconds / planned:.2f}",
            f"{found.state / GIB:.2f}",
            f"{found.state / state:.3f}",
            f"{found.routed / (workload.seq_length * 2):.3f}",
            f"{found.kept / GIB:.3f}",
            f"{said.activations / case.layers / GIB:.3f}",
            f"{found.kept * case.layers / said.activations:.3f}",
            f"{found.peak / GIB:.2f}",
            f"{(said.activations + said.working) / GIB:.2f}",
            f"{found.peak / (said.activations + said.working):.2f}",
            f"{found.losses[0]:.3f} → {found.losses[1]:.3f}",
        ]
        yield f"| {case} | {' | '.join(cells)} |"


HEADS = (
    *("layers", "vocabulary", "CF", "experts", "weight gradients", "recompute"),
    *("step ms", "TFLOP/s", "MFU", "planned ms", "×"),
    *("state", "×", "routed", "kept per layer", "planned", "×"),
    *("peak", "planned", "×", "loss"),
)

# --- Kernels ---------------------------------------------------------------------------------

KINDS = {
    "optimizer": r"multi_tensor|adam|l2norm",
    "attention": r"sdpa|flash|fmha|fused_attn|cudnn",
    "matrices": r"gemm|nvjet|cutlass|xmma|cublas|splitk",
    "permutation and routing": (
        r"permute|sort|radix|topk|index|scatter|gather|cumsum|scan|softmax|histc|bincount|mask"
    ),
    "norms, activations, rotary": r"norm|silu|swiglu|rope|triton|fused_",
    "copies and fills": r"memcpy|memset|copy|fill",
}


def kernels(small: bool) -> Lines:
    """Break down the time of a step with capacity factor 1 by kind of kernel."""
    case, steps = Case(), 3
    training = Training(case, small)
    for _ in range(4):
        training.step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    started = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            training.step()
        torch.cuda.synchronize()
    wall = (time.perf_counter() - started) / steps
    spent: dict[str, float] = defaultdict(float)
    names: dict[str, float] = defaultdict(float)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            milliseconds = event.self_device_time_total / 1e3 / steps
            spent[kind_of(event.name)] += milliseconds
            names[event.name] += milliseconds
    training.close()
    planned = step_time(case.workload(small), case.mapping, hardware(CHIP))
    total = sum(spent.values())
    yield f"{case}: kernels {total:.0f} ms per step; {wall * 1e3:.0f} ms with the profiler."
    yield ""
    yield "| kernels | ms | share | planned ms | planned share |"
    yield "|---|---|---|---|---|"
    for kind, milliseconds in sorted(spent.items(), key=lambda each: -each[1]):
        share = milliseconds / total if total else 0
        yield f"| {kind} | {milliseconds:.1f} | {share:.1%} | {plan_cells(kind, planned)} |"
    others = {"memory-bound, all of them": planned.memory_bound, "host": planned.host}
    for kind, seconds in others.items():
        yield f"| {kind} | | | {seconds * 1e3:.1f} | {seconds / planned.total:.1%} |"
    yield ""
    yield "The longest kernels, ms per step:"
    yield ""
    for name, milliseconds in sorted(names.items(), key=lambda each: -each[1])[:40]:
        yield f"- {milliseconds:.2f} {kind_of(name)}: `{name[:110]}`"


def kind_of(kernel: str) -> str:
    """Return a kernel's purpose, inferred from the name."""
    for kind, pattern in KINDS.items():
        if re.search(pattern, kernel, re.IGNORECASE):
            return kind
    return "rest"


def plan_cells(kind: str, planned: StepTime) -> str:
    if not hasattr(planned, kind):
        return " | "
    seconds = getattr(planned, kind)
    return f"{seconds * 1e3:.1f} | {seconds / planned.total:.1%}"


# --- Filling ---------------------------------------------------------------------------------


def filling(small: bool) -> Lines:
    """Fill layers of Llama 3 8B from safetensors in the page cache."""
    workload = Case().workload(small)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_random(directory, Case().config(small), workload.arch)
        yield "| experts | read GiB | written GiB | s | read GiB/s | written GiB/s |"
        yield "|---|---|---|---|---|---|"
        for kind, overrides in EXPERTS.items():
            model = build(workload.arch, E8T2, torch.bfloat16, **overrides)
            written = sum(parameter.nbytes for parameter in model.parameters()) / GIB
            reports = [fill(model, directory) for _ in range(4)]
            seconds = statistics.median(report.seconds for report in reports[1:])
            read = reports[0].bytes_read / GIB
            yield (
                f"| {kind} | {read:.2f} | {written:.2f} | {seconds:.2f} | {read / seconds:.2f} | "
                f"{written / seconds:.1f} |"
            )
            del model
            free()


def fill(model: torch.nn.Module, directory: Path) -> LoadReport:
    return load.fill([model], HuggingFaceCheckpoint(directory), E8T2)


def write_random(directory: Path, config: dict[str, Any], arch: Architecture) -> None:
    """Write a dense Llama in bf16 with random weights."""
    from safetensors.torch import save_file

    (directory / "config.json").write_text(json.dumps(config))
    shapes = family_of(config).shapes(arch)
    weights = {
        name: (0.02 * torch.randn(shape, device="cuda")).bfloat16().cpu()
        for name, shape in shapes.items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


# --- The recipe in NeMo ------------------------------------------------------------------------

PADDED = ("moe_expert_capacity_factor=2.0", "moe_pad_expert_input_to_capacity=True")
RUNS = {
    "as it is": (),
    "padded to capacity factor 2": PADDED,
    "padded, with CUDA graphs": (*PADDED, "cuda_graphs=True"),
}
"""Arguments of the recipe. CUDA graphs need a GPU."""


def recipe(small: bool) -> Lines:
    """Profile the recipe, each run in a process of its own; a failure leaves the others."""
    for name, settings in list(RUNS.items())[: None if ON_GPU else 2]:
        words = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_recipe", *settings]
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "out.md"
            words += ["--out", str(out), *(["--small"] if small else [])]
            ran = subprocess.run(words, capture_output=True, text=True)
            yield f"### {name.capitalize()}"
            yield ""
            yield out.read_text() if out.exists() else f"Failed: {ran.stderr[-2000:]}"


# --- The run ---------------------------------------------------------------------------------

PARTS: dict[str, tuple[str, Callable[[bool], Lines]]] = {
    "exactness": ("Step 0", exactness),
    "layers": ("Layers of Llama 3 8B as E8T2, sequence 8,192, microbatch 1, bf16", layers),
    "kernels": ("What a step spends its time on", kernels),
    "filling": ("Filling the experts", filling),
    "recipe": ("A step of SmolLM2-135M as E8T2 in NeMo", recipe),
}


def head() -> Lines:
    name = torch.cuda.get_device_name() if ON_GPU else f"CPU, {platform.machine()}"
    yield f"# {date.today()}, one {name}"
    yield ""
    packages = ("torch", "megatron-core", "nemo-toolkit", "transformer-engine")
    yield f"`python -m benchmarks.gpu`; {', '.join(f'{p} {installed(p)}' for p in packages)}."


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def main() -> None:
    """Write the results as Markdown, part by part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="a file to add to; standard output without it")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        start(directory)
        out = options.out.open("a") if options.out else sys.stdout
        for line in head():
            print(line, file=out, flush=True)
        for part in options.parts:
            title, run = PARTS[part]
            print(f"\n## {title}\n", file=out, flush=True)
            for line in run(options.small):
                print(line, file=out, flush=True)
            free()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

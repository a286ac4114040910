"""Where the time of the recipe `smollm2_135m_e8t2` goes, in a run of NeMo as users start it.

Measured per step, and per layer and microbatch: time within the step and outside it, kernels, waits
of the host for the GPU, the allocator, and the Python functions in which the host spends its time.
Without --dense and --data the weights are random, and the text is Python's own library.

Usage: python -m benchmarks.gpu_recipe [--small] [--dense DIR --data 'PREFIXES'] [KEY=VALUE …]

KEY=VALUE are arguments of the recipe, such as `micro_batch_size=32`, and `cuda_graphs=True`.
"""

import argparse
import cProfile
import io
import pstats
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fiddle
import lightning.pytorch as pl
import torch
from nemo_upcycle_recipes import factory
from nemo_upcycle_recipes.arguments import override
from nemo_upcycle_recipes.numbers import SMOLLM2_135M_E8T2

from nemo_upcycle.planner.flops import flops_of_config, utilization
from nemo_upcycle.planner.hardware import device_peak_tflops
from tests.tiny import write_llama
from tests.workspace import make_workspace

ON_GPU = torch.cuda.is_available()
SMALL = ("seq_length=64", "global_batch_size=4", "micro_batch_size=2", "precision=32")
WARM_UP, TIMED, PROFILED = 4, 8, 1
"""Steps: not counted, timed, then profiled for kernels, and as many for the host's Python."""

WAITS = re.compile("cuda(Stream|Device|Event)Synchronize|^cudaMemcpy$|aten::_local_scalar_dense")
"""Calls in which the host waits for the GPU; `.item()` is the last of them."""

LAUNCHES = re.compile("cu(da)?Launch(Cooperative)?Kernel|cudaGraphLaunch")


class Watch(pl.Callback):
    """A callback that times and profiles the steps of a run."""

    def __init__(self) -> None:
        self.inside: list[float] = []
        self.outside: list[float] = []
        self.first = 0.0
        self.losses: list[float] = []
        self.retries = 0
        self.python = cProfile.Profile()
        self.profile: Any = None
        self._step, self._began, self._ended = 0, time.perf_counter(), 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin a step."""
        kind = self._kind
        now = _now()
        if kind == "timed" and self._ended:
            self.outside.append(now - self._ended)
        if self._step == WARM_UP:
            self.retries = _allocator("num_alloc_retries")
        if self._step == WARM_UP + TIMED:
            self.profile = torch.profiler.profile()
            self.profile.__enter__()
        if kind == "python":
            self.python.enable()
        self._began = now

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """End a step."""
        kind, now = self._kind, _now()
        if kind == "python":
            self.python.disable()
        if kind == "timed":
            self.inside.append(now - self._began)
        if self._step == 0:
            self.first = now - self._began
        if self._step == WARM_UP + TIMED - 1:
            self.retries = _allocator("num_alloc_retries") - self.retries
        self._step += 1
        if self._step == WARM_UP + TIMED + PROFILED:
            self.profile.__exit__(None, None, None)
        self.losses.append(float(trainer.callback_metrics["reduced_train_loss"]))
        self._ended = now

    @property
    def _kind(self) -> str:
        after = self._step - WARM_UP
        if after < 0:
            return "warm-up"
        return "timed" if after < TIMED else "kernels" if after < TIMED + PROFILED else "python"


def _now() -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def _allocator(name: str) -> int:
    return torch.cuda.memory_stats()[name] if ON_GPU else 0


def run(settings: list[str], dense: Path, data: str, small: bool) -> Iterator[str]:
    """Run the recipe and yield the results as Markdown."""
    graphs = "cuda_graphs=True" in settings
    settings = [each for each in settings if not each.startswith("cuda_graphs")]
    recipe = override(SMOLLM2_135M_E8T2, [*(SMALL if small else ()), *settings])
    with tempfile.TemporaryDirectory() as directory:
        configured = factory.pretrain(
            recipe,
            dir=directory,
            name="profiled",
            dense_checkpoint=str(dense),
            tokenizer=None,
            data_paths=data,
            max_steps=WARM_UP + TIMED + 2 * PROFILED,
            accelerator="auto",
            cuda_graphs=graphs,
        )
        configured.trainer.enable_checkpointing = False
        configured.trainer.limit_val_batches = 0
        configured.log.ckpt, configured.resume = None, None
        built, watch = fiddle.build(configured), Watch()
        built.keywords["trainer"].callbacks.append(watch)
        built()
    config = built.keywords["model"].config
    schedule = recipe.schedule
    microbatches = schedule.global_batch_size // schedule.micro_batch_size
    yield f"Arguments: {' '.join(settings) or 'none'}{' cuda_graphs=True' if graphs else ''}."
    yield ""
    yield from _times(watch, schedule, config, microbatches)
    yield from _events(watch, config.num_layers * microbatches)
    yield from _python(watch)


def _times(watch: Watch, schedule: Any, config: Any, microbatches: int) -> Iterator[str]:
    inside, outside = _median(watch.inside), _median(watch.outside)
    parts = config.num_layers * microbatches
    tokens = schedule.tokens_per_step / (inside + outside)
    yield "| | per step | per layer and microbatch |"
    yield "|---|---|---|"
    yield f"| first step | {watch.first:.1f} s | |"
    yield f"| within a step | {inside * 1e3:.1f} ms | {inside / parts * 1e3:.2f} ms |"
    yield f"| outside: data, loop, logs | {outside * 1e3:.1f} ms | |"
    yield f"| tokens per second | {tokens:,.0f} | |"
    peak = device_peak_tflops(torch.cuda.get_device_name()) if ON_GPU else None
    if peak is not None:
        counted, seconds = flops_of_config(config), inside + outside
        used = utilization(counted, schedule.global_batch_size, seconds, 1, peak)
        yield f"| MFU | {used['mfu']:.1%} | |"
    yield f"| allocator's retries, timed steps | {watch.retries} | |"
    if ON_GPU:
        for name in ("allocated", "reserved"):
            peak_bytes = getattr(torch.cuda, f"max_memory_{name}")()
            yield f"| largest {name} | {peak_bytes / 2**30:.1f} GiB | |"
    yield f"| loss | {watch.losses[0]:.3f} → {watch.losses[-1]:.3f} | |"


def _events(watch: Watch, parts: int) -> Iterator[str]:
    """Yield counts and times of kernels, launches and waits."""
    events = [each for each in watch.profile.events() if not each.is_user_annotation]
    on_gpu = [each for each in events if each.device_type == torch.autograd.DeviceType.CUDA]
    on_host = [each for each in events if each.device_type != torch.autograd.DeviceType.CUDA]
    launches = [each for each in on_host if LAUNCHES.search(each.name)]
    waits = [each for each in on_host if WAITS.search(each.name)]
    rows = {
        "kernels": (len(on_gpu), sum(each.self_device_time_total for each in on_gpu)),
        "launches": (len(launches), sum(each.cpu_time_total for each in launches)),
        "waits of the host": (len(waits), sum(each.self_cpu_time_total for each in waits)),
    }
    for name, (count, microseconds) in rows.items():
        step = f"{count / PROFILED:.0f}, {microseconds / PROFILED / 1e3:.1f} ms"
        part = f"{count / PROFILED / parts:.1f}, {microseconds / PROFILED / parts / 1e3:.3f} ms"
        yield f"| {name}, profiled | {step} | {part} |"
    yield ""
    for title, some in (("Waits", waits), ("Kernels", on_gpu), ("Operations of the host", on_host)):
        yield f"{title}, the longest; ms and calls per step:"
        yield ""
        spent: Counter[str] = Counter()
        for each in some:
            gpu = each.device_type == torch.autograd.DeviceType.CUDA
            spent[each.name] += each.self_device_time_total if gpu else each.self_cpu_time_total
        calls = Counter(each.name for each in some)
        for name, microseconds in spent.most_common(20):
            count = calls[name] / PROFILED
            yield f"- {microseconds / PROFILED / 1e3:.2f}, {count:.0f}: `{name[:100]}`"
        yield ""


def _python(watch: Watch) -> Iterator[str]:
    """Yield the Python functions in which the host spends its time."""
    text = io.StringIO()
    pstats.Stats(watch.python, stream=text).sort_stats("tottime").print_stats(40)
    yield f"Python's functions over {PROFILED} steps, by their own time:"
    yield ""
    yield "```"
    for line in text.getvalue().splitlines():
        if line.strip():
            yield re.sub(r"\S*site-packages/", "", line.rstrip())
    yield "```"
    yield ""


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> None:
    """Print the results of one run as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--dense", type=Path, help="the dense checkpoint, with its tokenizer")
    parser.add_argument("--data", help="prefixes of tokenized data")
    parser.add_argument("--out", type=Path, help="a file to write; standard output without it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        dense, data = options.dense, options.data
        if dense is None or data is None:
            made = make_workspace(Path(name))
            corpora = ("documentation", "sources")
            data = " ".join(f"0.5 {made}/data/{corpus}" for corpus in corpora)
            dense = made / "dense_hf"
            if not options.small:
                shutil.rmtree(dense)
                write_llama(dense, **SMOLLM2_135M_E8T2.config)
                shutil.copytree(made / "tokenizer", dense, dirs_exist_ok=True)
        text = "\n".join(run(options.settings, dense, data, options.small))
    if options.out:
        options.out.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()

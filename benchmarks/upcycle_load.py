"""Compare ways to fill an MoE from a dense checkpoint: seconds, memory and bytes read per rank.

All methods run in turn, on 1, 2 and 4 gloo ranks. The source is a generated checkpoint of Llama 3.2
1B's shape in bf16, with fewer layers, because the other methods need several times the MoE's
memory:

- ours: `load.fill`, with every rank reading what the rank needs, and with `read_once`;
- Megatron: `upcycling_utils.upcycle_state_dict` and `load_state_dict`, with the dense model
  already in memory (loading the dense model is not counted);
- offline: transformers loads the dense model and writes a Mixtral checkpoint, from which each rank
  loads a part;
- floor: read the required bytes once into one buffer, and write the rank's parameters once.

All files are in the page cache, and all parameters have been touched before. Memory is the peak of
the process's resident memory minus the resident memory after building the model.

Usage: python -m benchmarks.upcycle_load [--layers 4] [--runs 3] [--only ours] [--dir DIR]
"""

import argparse
import gc
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from tests.distributed import pool

UPCYCLING = UpcyclingConfig(num_moe_experts=8, moe_router_topk=2)
FOLDINGS = {
    1: ParallelFolding(),
    2: ParallelFolding(expert_model_parallel_size=2),
    4: ParallelFolding(expert_model_parallel_size=4),
}
METHODS = ("ours", "ours, read_once", "Megatron", "offline Hugging Face")
LLAMA32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True)
class Sample:
    """Figures of a rank, in seconds and bytes; `floor` is None if not measured."""

    seconds: float
    floor: float | None
    parameters: int
    largest_slice: int
    peak_extra: int
    read: int


# --- What runs on the ranks ------------------------------------------------------------------


def measure(method: str, dense: Path, runs: int, scratch: Path) -> list[Sample]:
    """Build the model, fill it `runs` times with a method, and measure each time."""
    from nemo_upcycle.checkpoint import open_checkpoint
    from nemo_upcycle.engine.load import fill
    from nemo_upcycle.engine.owned_shards import owned_shards
    from nemo_upcycle.families import family_of
    from nemo_upcycle.plans.rank import block_bytes, make_plan

    world_size = torch.distributed.get_world_size()
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)  # set by torchrun
    chunks = _build(dense, FOLDINGS[world_size], UPCYCLING)
    size = sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters())
    with open_checkpoint(str(dense)) as checkpoint:
        family = family_of(checkpoint.config)
        shards = [own.shard for chunk in chunks for own in owned_shards(chunk)]
        arch = family.architecture(checkpoint.config)
        plan = make_plan(shards, checkpoint.tensors, family, arch, UPCYCLING)
        largest = max(block_bytes(block, checkpoint.tensors) for block in plan.copies)

    def ours(read_once: bool) -> int:
        with open_checkpoint(str(dense)) as checkpoint:
            return fill(chunks, checkpoint, UPCYCLING, read_once=read_once).bytes_read

    filled: Callable[[], int] = {
        "ours": lambda: ours(read_once=False),
        "ours, read_once": lambda: ours(read_once=True),
        "Megatron": lambda: _megatron(chunks, prepared),
        "offline Hugging Face": lambda: _offline(chunks, dense, scratch),
    }[method]
    prepared = _dense_model(dense, world_size) if method == "Megatron" else None
    samples = []
    for _ in range(runs):
        floor = _floor(plan, dense, chunks) if method.startswith("ours") else None
        torch.distributed.barrier()
        gc.collect()
        before = _reset_peak()
        started = time.perf_counter()
        read = filled()
        seconds = time.perf_counter() - started
        samples.append(Sample(seconds, floor, size, largest, _peak() - before, read))
        torch.distributed.barrier()
    return samples


def _build(dense: Path, folding: ParallelFolding, upcycling: UpcyclingConfig) -> Any:
    from tests.distributed.scenarios import build

    chunks = build(
        dense,
        folding,
        upcycling,
        params_dtype=torch.bfloat16,
        bf16=True,
        pipeline_dtype=torch.bfloat16,
        seq_length=128,
        perform_initialization=False,
    )
    with torch.no_grad():
        for parameter in (p for chunk in chunks for p in chunk.parameters()):
            parameter.zero_()  # commits the memory
    return chunks


def _floor(plan: Any, dense: Path, chunks: Any) -> float:
    """Read the plan's bytes once, and write the parameters once; return the seconds."""
    from nemo_upcycle.checkpoint import open_checkpoint

    buffer = torch.ones(8 * 2**20, dtype=torch.uint8)
    memory, values = memoryview(buffer.numpy()), buffer.view(torch.bfloat16)
    with open_checkpoint(str(dense)) as checkpoint:
        runs = [
            (piece.start + block.rows[0] * row, piece.start + block.rows[1] * row, piece.file)
            for block in plan.copies
            for piece in checkpoint.pieces(block.tensor)
            for row in [checkpoint.tensors[block.tensor].width * 2]
        ]
        started = time.perf_counter()
        for start, stop, file in runs:
            for place in range(start, stop, len(memory)):
                checkpoint._read_run(file, place, memory[: min(len(memory), stop - place)])
    with torch.no_grad():
        for parameter in (p.view(-1) for chunk in chunks for p in chunk.parameters()):
            for part in parameter.split(len(values)):
                part.copy_(values[: len(part)])
    return time.perf_counter() - started


def _dense_model(dense: Path, world_size: int) -> Any:
    from nemo_upcycle.checkpoint import open_checkpoint
    from nemo_upcycle.engine.load import fill

    control = UpcyclingConfig(num_moe_experts=None)
    folding = replace(FOLDINGS[world_size], expert_model_parallel_size=1)
    model = _build(dense, folding, control)
    with open_checkpoint(str(dense)) as checkpoint:
        fill(model, checkpoint, control)
    return model


def _megatron(chunks: Any, dense_model: Any) -> int:
    from megatron.core.transformer.moe.upcycling_utils import upcycle_state_dict

    state = upcycle_state_dict(chunks, dense_model)
    chunks[0].load_state_dict(state["model"], strict=False)
    return 0


def _offline(chunks: Any, dense: Path, scratch: Path) -> int:
    """Write a Mixtral checkpoint on rank 0; then each rank loads its part."""
    from safetensors import safe_open

    from nemo_upcycle.engine.owned_shards import owned_shards

    if torch.distributed.get_rank() == 0:
        _convert(dense, scratch)
    torch.distributed.barrier()
    read = 0
    handles = [safe_open(file, framework="pt") for file in sorted(scratch.glob("*.safetensors"))]
    where = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118
    with torch.no_grad():
        for own in (own for chunk in chunks for own in owned_shards(chunk)):
            layer, _, rest = own.shard.name.removeprefix("decoder.layers.").partition(".mlp.")
            if ".experts." not in own.shard.name:
                continue  # no larger than in the dense model
            expert, fc = rest.split(".")[1:3]
            gate = own.shard.offset[0] == 0
            weight = {"linear_fc2": "w2", "linear_fc1": "w1" if gate else "w3"}[fc]
            name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{weight}.weight"
            values = where[name].get_tensor(name)
            read += values.nbytes
            own.data.copy_(values)
    return read


def _convert(dense: Path, scratch: Path) -> None:
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    state = model.state_dict()
    rest = {name: value for name, value in state.items() if ".mlp." not in name}
    rest.pop("lm_head.weight", None)
    save_file(rest, scratch / "rest.safetensors")
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    for layer in range(model.config.num_hidden_layers):
        experts = {
            f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{new}.weight": state[
                f"model.layers.{layer}.mlp.{old}.weight"
            ].clone()
            for expert in range(8)
            for old, new in names.items()
        }
        save_file(experts, scratch / f"layer-{layer}.safetensors")


def _reset_peak() -> int:
    """Reset the process's peak of resident memory; return the current resident memory."""
    Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def _peak() -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) * 1024


# --- The run ---------------------------------------------------------------------------------


def generate(directory: Path, layers: int) -> Path:
    """Write a random checkpoint of Llama 3.2 1B's shape."""
    import json

    from safetensors.torch import save_file

    from nemo_upcycle.families.llama import LLAMA

    config = LLAMA32_1B | {"num_hidden_layers": layers}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(-1000, 1000, shape, generator=generator, dtype=torch.int16)
        .to(torch.bfloat16)
        .div_(1000)
        for name, shape in LLAMA.shapes(LLAMA.architecture(config)).items()
    }
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def row(world_size: int, method: str, by_rank: list[list[Sample]]) -> str:
    """Format a row of the table: medians over the runs of the slowest or largest rank."""
    runs = list(zip(*by_rank, strict=True))
    seconds = statistics.median(max(s.seconds for s in run) for run in runs)
    extra = max(s.peak_extra for run in runs for s in run)
    first = max((samples[0] for samples in by_rank), key=lambda s: s.parameters)
    floors = [max(s.floor for s in run) for run in runs if run[0].floor is not None]
    ratios = [
        max(s.seconds for s in run) / max(s.floor for s in run)
        for run in runs
        if run[0].floor is not None
    ]
    gib = 2**30
    cells = [
        str(world_size),
        method,
        f"{seconds:.2f}",
        f"{statistics.median(floors):.2f}" if floors else "",
        f"{statistics.median(ratios):.2f}" if ratios else "",
        f"{first.parameters / gib:.2f}",
        f"{extra / 2**20:.0f}",
        f"{(first.parameters + extra) / first.parameters:.2f}",
        f"{max(s.read for run in runs for s in run) / gib:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--only", choices=METHODS, nargs="+", default=METHODS)
    parser.add_argument("--dir", type=Path, default=None, help="where to put files; needs disk")
    arguments = parser.parse_args()
    pool.TIMEOUT_S = 1800.0
    scratch = Path(tempfile.mkdtemp(dir=arguments.dir))
    try:
        dense = generate(scratch / "dense", arguments.layers)
        size = (dense / "model.safetensors").stat().st_size
        print(
            f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, Python "
            f"{platform.python_version()}, torch {torch.__version__}; {arguments.layers} layers, "
            f"dense checkpoint {size / 2**30:.2f} GiB; medians of {arguments.runs} runs.\n"
        )
        print(
            "| ranks | method | s | floor s | s / floor | parameters GiB per rank "
            "| peak extra MiB | peak / parameters | read GiB per rank |"
        )
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        for world_size in arguments.ranks:
            for method in arguments.only:
                converted = scratch / "mixtral"
                converted.mkdir(exist_ok=True)
                ranks = pool.RankPool(size=world_size)
                try:
                    samples = ranks.run(
                        measure,
                        world_size,
                        method=method,
                        dense=dense,
                        runs=arguments.runs,
                        scratch=converted,
                    )
                finally:
                    ranks.stop()
                print(row(world_size, method, samples), flush=True)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()

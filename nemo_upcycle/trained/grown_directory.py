"""Write a larger MoE, made of a trained one, as a directory that transformers loads.

At most one chunk of a tensor is in memory.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.checkpoint import DTYPE_BYTES, DenseCheckpoint
from nemo_upcycle.checkpoint.dtypes import DTYPE_NAMES, torch_dtype
from nemo_upcycle.checkpoint.fingerprint import weights_fingerprint
from nemo_upcycle.families.moe_family import ROUTER
from nemo_upcycle.initializers.random import ROUTER as ROUTER_STREAM
from nemo_upcycle.initializers.random import normal_row
from nemo_upcycle.plans.rank import chunk_spans
from nemo_upcycle.progress import Progress, no_progress
from nemo_upcycle.trained.configs import write_grown_configs
from nemo_upcycle.trained.growth import GrownDirectory, Growth, plan_growth
from nemo_upcycle.trained.model_card import hub_name, write_model_card
from nemo_upcycle.trained.outputs import (
    SHARD_BYTES,
    Output,
    check_finite_fp16,
    new_directory,
    write_tensors,
)

GROWN_FROM = "grown_from.json"
"""The record of what a larger MoE was made of, in its directory."""


def grow_directory(
    source: str | Path,
    directory: str | Path,
    growth: Growth | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> GrownDirectory:
    """Write a trained MoE as a larger one that transformers loads.

    Args:
        source: See `plan_growth`.
        directory: Output directory; must not exist, and appears only when complete.
        growth: What the MoE becomes.
        dtype: See `plan_growth`.
        progress: Called with bytes written and bytes to write.
        shard_bytes: Maximum bytes per file.

    Returns:
        The plan that was executed.

    Raises:
        UpcyclingError: See `plan_growth`; or `directory` exists or cannot be written, or a value
            does not fit the dtype. No files are left then.
    """
    plan = plan_growth(source, growth, dtype)
    directory = Path(directory).expanduser()
    with new_directory(directory, plan.bytes, [plan.directory]) as new:
        # Small files first: errors appear before the weights are written.
        _write_small_files(plan, new, directory.name)
        chunks = partial(_chunks, plan)
        write_tensors(plan.outputs, chunks, new, progress or no_progress, shard_bytes)
    return plan


def _write_small_files(plan: GrownDirectory, directory: Path, title: str) -> None:
    source = plan.source
    write_grown_configs(plan.directory, _config(plan), directory)
    name, fingerprint = hub_name(plan.directory), weights_fingerprint(source.checkpoint)
    record = {"source": name, "fingerprint": fingerprint, "experts": source.model.num_experts}
    record["growth"] = asdict(plan.growth)
    (directory / GROWN_FROM).write_text(json.dumps(record, indent=2) + "\n")
    facts = {
        "experts": f"{plan.model.num_experts} per MoE layer, {plan.model.topk} per token; "
        f"{source.model.num_experts} and {source.model.topk} in the source",
        "parameters": f"{plan.parameters:,}, {plan.active_parameters:,} per token",
        "step 0": str(plan.exactness),
        "architecture": plan.family.class_name,
    }
    made = "grown from {names} with nemo-upcycle (expert upcycling, arXiv 2604.19835)"
    write_model_card(directory, title, {name: plan.directory}, facts, made)


def _config(plan: GrownDirectory) -> dict[str, Any]:
    """Return the source's config.json with what the larger model has in other numbers."""
    config = dict(plan.source.checkpoint.config)
    before, after = plan.family.config(plan.source.model), plan.family.config(plan.model)
    config |= {key: value for key, value in after.items() if value != before[key]}
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if key in config:
            config[key] = plan.model.num_experts
    if plan.dtype != plan.source.dtype:
        config["dtype" if "dtype" in config else "torch_dtype"] = DTYPE_NAMES[plan.dtype]
    return config


def _chunks(plan: GrownDirectory, output: Output) -> Iterator[bytes]:
    """Yield a tensor's bytes."""
    checkpoint, wanted = plan.source.checkpoint, torch_dtype(output.info.dtype)
    for start, part in sorted(output.parts.items()):
        info = checkpoint.tensors[part.name]
        if not info.bytes:
            continue
        layer = _layer_of_router(plan, part.name)
        for rows in chunk_spans((0, part.count), info.bytes // part.count):
            values = _read(checkpoint, part.name, rows)
            if start and layer is not None and plan.growth.router_noise:
                values = _with_noise(plan, part.name, layer, values, start + rows[0])
            stored = values.to(wanted)
            if wanted == torch.float16:
                check_finite_fp16(part.name, stored)
            yield stored.view(torch.uint8).numpy().tobytes()


def _read(checkpoint: DenseCheckpoint, name: str, rows: tuple[int, int]) -> torch.Tensor:
    """Return rows of a tensor."""
    info = checkpoint.tensors[name]
    buffer = bytearray((rows[1] - rows[0]) * info.width * DTYPE_BYTES[info.dtype])
    checkpoint.read_into(memoryview(buffer), name, rows, None)
    return torch.frombuffer(buffer, dtype=torch_dtype(info.dtype)).view(-1, info.width)


def _layer_of_router(plan: GrownDirectory, tensor: str) -> int | None:
    """Return the layer whose router a tensor is; None if it is no router."""
    (rows,) = plan.family.parameters[ROUTER].rows(plan.model.arch)
    before, _, after = rows.tensor.partition("{layer}")
    found = re.fullmatch(rf"{re.escape(before)}(\d+){re.escape(after)}", tensor)
    return int(found[1]) if found else None


def _with_noise(
    plan: GrownDirectory, router: str, layer: int, values: torch.Tensor, first: int
) -> torch.Tensor:
    """Return router rows with noise, the same for every expert of the larger model always.

    Args:
        plan: The plan.
        router: The router's name.
        layer: The router's layer.
        values: Rows [experts, hidden].
        first: The larger model's expert that has the first of them.
    """
    assert plan.growth.router_noise is not None
    checkpoint = plan.source.checkpoint
    whole = _read(checkpoint, router, (0, plan.source.model.num_experts)).double()
    scale = plan.growth.router_noise * whole.std(correction=0).item()
    drawn = [
        torch.from_numpy(normal_row(plan.growth.seed, ROUTER_STREAM, layer, expert, 0, len(row)))
        for expert, row in enumerate(values, start=first)
    ]
    return values.double() + scale * torch.stack(drawn)

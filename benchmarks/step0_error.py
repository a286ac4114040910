"""Measure the error of the upcycled model at step 0 for each choice of settings.

Writes a table to standard output, which is `docs/step0.md`. Everything is computed in fp32 by the
real Megatron model on one rank. The dense models are random, of two families: Llama (SwiGLU) and
Nemotron (squared ReLU).

- layer: |MoE(x) − FFN(x)| / |FFN(x)| of the second layer, over 2,048 random inputs
- logits: |MoE − dense| / |dense| of the whole model of 4 layers, over 256 random tokens

Usage: python -m benchmarks.step0_error > docs/step0.md
"""

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.calibration.calibrate import Calibration, calibrate
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.data.tokenizer import train_tokenizer
from tests.calibrations import write_calibratable
from tests.corpora import many, write
from tests.distributed.pool import RankPool
from tests.tiny import tokens, write_dense

EXPANSION_RATE = 8
SHAPES = ((1, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8))
"""Granularity and top-k; the last is the best in arXiv 2410.07524, 64 experts."""

SCALINGS = ("exact", "paper", "none")
FAMILIES = ("llama", "nemotron")
MODEL = {"hidden_size": 256, "intermediate_size": 1024, "initializer_range": 0.05}
OTHERS: dict[str, dict[str, Any]] = {
    "random router, G4 T8": {
        "num_moe_experts": 32,
        "granularity": 4,
        "moe_router_topk": 8,
        "router_initializer": "random",
    },
    "top-k 6, not a multiple of G4": {
        "num_moe_experts": 32,
        "granularity": 4,
        "moe_router_topk": 6,
    },
    "softmax first, G4 T8, `exact`, router std 1e-4": {
        "num_moe_experts": 32,
        "granularity": 4,
        "moe_router_topk": 8,
        "moe_router_pre_softmax": True,
        "weight_scaling": "exact",
        "router_init_std": 1e-4,
    },
    "shared expert": {"moe_shared_expert": True},
    "shared expert, `none`": {"moe_shared_expert": True, "weight_scaling": "none"},
    "every 2nd layer": {"moe_layer_freq": "skip_first=1,every=2"},
    "capacity factor 1": {"moe_expert_capacity_factor": 1.0},
    "capacity factor 2": {"moe_expert_capacity_factor": 2.0},
    "capacity factor 4": {"moe_expert_capacity_factor": 4.0},
    "`noise(std=0.01)`": {"initializer": "noise(std=0.01)"},
    "`drop(ratio=0.5)`": {"initializer": "drop(ratio=0.5)"},
    "`hybrid(copy, drop)`": {"initializer": "hybrid(copy, drop)"},
    "`random`": {"initializer": "random"},
}
_G4 = {"num_moe_experts": 32, "granularity": 4, "moe_router_topk": 8}
OF_STATISTICS: dict[str, dict[str, Any]] = {
    "`centroids`": {"router_initializer": "centroids(stats={file!r})"},
    "`activation_sorted`, G4 T8": {**_G4, "initializer": "activation_sorted(stats={file!r})"},
    "`partial(shared=0.5)`": {"initializer": "partial(stats={file!r})"},
    "`cluster_svd(rank=128)`, random router": {"initializer": "cluster_svd(stats={file!r})"},
    "`cluster_svd(rank=128)`, `centroids`": {
        "initializer": "cluster_svd(stats={file!r})",
        "router_initializer": "centroids(stats={file!r})",
    },
    "`cluster_svd(rank=128)`, G4 T8, `centroids`": {
        **_G4,
        "initializer": "cluster_svd(stats={file!r})",
        "router_initializer": "centroids(stats={file!r})",
    },
}
"""Rows with statistics of text, of models with a tokenizer."""

TOKENS, VOCABULARY = 20_000, 280


@dataclass(frozen=True)
class Errors:
    """Relative errors of the second layer and of the logits."""

    layer: float
    logits: float


def measure(dense: Path, upcycling: UpcyclingConfig) -> Errors:
    """Upcycle on one rank and compare with the dense control."""
    from tests.distributed import scenarios

    ids = tokens(rows=2, length=128)
    control = UpcyclingConfig(num_moe_experts=None)
    inputs = torch.randn(256, 8, MODEL["hidden_size"], generator=torch.Generator().manual_seed(0))
    outputs = []
    for chosen in (control, upcycling):
        chunks = scenarios.upcycled(dense, ParallelFolding(), chosen)
        logits = scenarios.logits(chunks, ids)
        assert logits is not None
        outputs.append((_feed_forward(chunks[0], inputs), logits[1]))
    (dense_layer, dense_logits), (layer, found) = outputs
    return Errors(_relative(layer, dense_layer), _relative(found, dense_logits))


@torch.no_grad()
def _feed_forward(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Return the output of the second layer's feed-forward part, including the norm."""
    layer = model.decoder.layers[1].eval()
    return layer.mlp(layer.pre_mlp_layernorm(inputs))[0]


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def table() -> Iterator[tuple[str, ...]]:
    """Yield granularity, top-k, order and scaling per row of the main table."""
    yield from (
        (str(granularity), str(topk), order, scaling)
        for (granularity, topk), order, scaling in itertools.product(
            SHAPES, ("top-k first", "softmax first"), SCALINGS
        )
        if granularity > 1 or order == "softmax first" or scaling == "exact"
    )


def config_of(granularity: str, topk: str, order: str, scaling: str) -> UpcyclingConfig:
    """Return the configuration of a row."""
    return UpcyclingConfig(
        num_moe_experts=EXPANSION_RATE * int(granularity),
        granularity=int(granularity),
        moe_router_topk=int(topk),
        moe_router_pre_softmax=order == "softmax first",
        weight_scaling=scaling,
    )


def calibrated(dense: Path, text: Path) -> str:
    """Calibrate a dense model; return the file."""
    file = dense / "statistics"
    rank = MODEL["hidden_size"] // 2
    job = Calibration(str(dense), (str(text),), file, TOKENS, 128, cluster_rank=rank)
    calibrate(job)
    return str(file)


def _with_file(values: dict[str, Any], file: str) -> dict[str, Any]:
    return {k: v.format(file=file) if isinstance(v, str) else v for k, v in values.items()}


def _with_statistics(ranks: RankPool, scratch: Path) -> Iterator[list[str]]:
    """Yield the rows of `OF_STATISTICS`."""
    text = write(scratch / "text.jsonl", many(400))
    train_tokenizer([text], scratch / "tokenizer", VOCABULARY)
    options = {**MODEL, "num_hidden_layers": 4}
    models = {
        name: write_calibratable(scratch / f"read-{name}", scratch / "tokenizer", name, **options)
        for name in FAMILIES
    }
    files = {name: calibrated(dense, text) for name, dense in models.items()}
    for label, values in OF_STATISTICS.items():
        cells = [label]
        for name, dense in models.items():
            upcycling = UpcyclingConfig(**_with_file(values, files[name]))
            (errors,) = ranks.run(measure, 1, dense=dense, upcycling=upcycling)
            cells += [_cell(errors.layer), _cell(errors.logits)]
        yield cells


def _cell(error: float) -> str:
    return "0" if error == 0 else f"{error:.1e}" if error < 1e-3 else f"{error:.3f}"


def main() -> None:
    ranks = RankPool(size=1)
    with tempfile.TemporaryDirectory() as scratch:
        dense = {name: write_dense(Path(scratch) / name, name, **MODEL) for name in FAMILIES}

        def row(upcycling: UpcyclingConfig) -> list[str]:
            cells = []
            for name in FAMILIES:
                (errors,) = ranks.run(measure, 1, dense=dense[name], upcycling=upcycling)
                cells += [_cell(errors.layer), _cell(errors.logits)]
            return cells

        print(HEAD)
        for place in table():
            upcycling = config_of(*place)
            cells = [*place[:3], f"`{place[3]}`", *row(upcycling)]
            print(f"| {' | '.join(cells)} |", flush=True)
        print(OTHER_HEAD)
        for name, values in OTHERS.items():
            print(f"| {' | '.join([name, *row(UpcyclingConfig(**values))])} |", flush=True)
        print(STATISTICS_HEAD)
        for cells in _with_statistics(ranks, Path(scratch)):
            print(f"| {' | '.join(cells)} |", flush=True)
    ranks.stop()


HEAD = f"""# What the model computes at step 0

The error of the upcycled model before the first training step, by granularity G, top-k T, order of
softmax and top-k, and weight scaling. `python -m benchmarks.step0_error` measured the errors on
Megatron's model in fp32, and wrote this page. `layer` is the relative error of a feed-forward
layer's output, `logits` the relative error of the whole model of 4 layers. Expansion rate
{EXPANSION_RATE}, hidden size {MODEL["hidden_size"]}, virtual groups, router std 0.02.

- `exact` multiplies up and down by √G (SwiGLU) or ∛G (squared ReLU). With top-k first, `exact` is
  exact up to fp32's rounding for both, and the default.
- `paper` (arXiv 2410.07524 Eq. 2, as in Megatron-Core) multiplies gate, up and down by ∛G.
  The gate goes through SiLU, so on SwiGLU this changes the function.
- With softmax first nothing is exact: the router's weights do not sum to 1, and no fixed scale
  compensates for all tokens. The base is then E·G²/T. The default is `none` for G = 1 (the ST-type
  router of arXiv 2412.09952) and `paper` for G > 1 (arXiv 2410.07524). `exact` has the smallest
    error in every row, and the error falls as the router's weights become more even.

| G | T | order | scaling | SwiGLU: layer | logits | squared ReLU: layer | logits |
|---|---|---|---|---|---|---|---|"""

OTHER_HEAD = """
Other choices, each with E8T2 and top-k first where nothing else is said:

| choice | SwiGLU: layer | logits | squared ReLU: layer | logits |
|---|---|---|---|---|"""

STATISTICS_HEAD = """
With [statistics](calibrate.md) of text, E8T2 where nothing else is said. Inputs of random models
have no subspace of their own, so that half the rank loses much; a trained model loses less
([measured](../benchmarks/results/2026-11-29-signals.md)).

| choice | SwiGLU: layer | logits | squared ReLU: layer | logits |
|---|---|---|---|---|"""


if __name__ == "__main__":
    main()
